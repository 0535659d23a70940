"""Recent means, rates, quantiles, the circuit breaker and the fleet monitor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.config import SLMSpec
from calm_serve.telemetry.circuit_breaker import BreakerLimits, BreakerState, CircuitBreaker
from calm_serve.telemetry.slm_stats import (
    HALF_LIFE_S,
    WINDOW_SIZE,
    FleetStats,
    SLMStats,
)
from calm_serve.telemetry.statistics import DecayedRate, Ewma, QuantileWindow
from calm_serve.testing import change_outcome, make_outcome
from calm_serve.types import (
    LoadAtDecision,
    Outcome,
    Prediction,
    PredictorVersion,
    PromptFeatures,
    ReplicaState,
    Residency,
    Versions,
)

SPEC = SLMSpec(id="small", model="acme/small", batching="interactive")
SLOTS = SPEC.limits.max_num_seqs

OK = make_outcome(
    "d1",
    at=0.0,
    predicted_replica="",
    replica_id="",
    ttft_s=0.1,
    e2e_s=1.0,
    decision_s=1e-4,
    prompt_tokens=20,
    energy_j=5.0,
    features=PromptFeatures(),
    load_features=(),
    predicted=None,
    versions=Versions(PredictorVersion("p"), "g", "f"),
)
FAILED = change_outcome(OK, status="error", http_status=500, ttft_s=None, e2e_s=None, tpot_s=None)


class Clock:
    """A clock that stands still until a test sets `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_mean_gives_a_value_one_half_life_old_half_the_weight() -> None:
    mean = Ewma(half_life_s=10.0)
    mean.add(0.0, 0.0)
    mean.add(3.0, 10.0)
    assert mean.mean == pytest.approx(2.0)


def test_a_mean_survives_a_pause_in_which_its_weight_underflows() -> None:
    mean = Ewma(half_life_s=1.0)
    mean.add(7.0, 0.0)
    assert mean.weight(1e5) == 0.0
    assert mean.mean == 7.0
    mean.add(1.0, 1e5)
    assert mean.mean == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e3)), min_size=1, max_size=50))
def test_mean_stays_between_the_values_it_has_seen(steps: list[tuple[float, float]]) -> None:
    mean, now = Ewma(half_life_s=5.0), 0.0
    for value, gap_s in steps:
        now += gap_s
        mean.add(value, now)
    values = [value for value, _ in steps]
    assert mean.mean is not None
    assert min(values) - 1e-6 <= mean.mean <= max(values) + 1e-6


@pytest.mark.parametrize("span_s", [5.0, 60.0, 600.0])
def test_rate_of_a_steady_stream_is_right_from_the_start(span_s: float) -> None:
    rate = DecayedRate(half_life_s=30.0, now=0.0)
    for step in range(int(span_s * 20)):
        rate.add(1.0, step / 20)
    assert rate.per_s(span_s) == pytest.approx(20.0, rel=0.02)


def test_rate_falls_to_a_half_one_half_life_after_the_last_event() -> None:
    rate = DecayedRate(half_life_s=30.0, now=0.0)
    for second in range(1000):
        rate.add(1.0, float(second))
    assert rate.per_s(1030.0) == pytest.approx(rate.per_s(1000.0) / 2, rel=1e-3)


def test_quantiles_are_exact_over_the_newest_values_only() -> None:
    window = QuantileWindow(size=100, max_age_s=60.0)
    for value in range(1, 201):
        window.add(float(value), 0.0)
    assert len(window) == 100
    assert window.quantiles((0.0, 0.5, 0.95, 1.0), 0.0) == (101.0, 150.0, 195.0, 200.0)


def test_quantiles_forget_what_is_too_old() -> None:
    window = QuantileWindow(size=10, max_age_s=60.0)
    window.add(1.0, 0.0)
    window.add(9.0, 50.0)
    assert window.quantiles((0.5,), 70.0) == (9.0,)
    assert window.quantiles((0.5,), 111.0) == (None,)


def opened(limits: BreakerLimits) -> CircuitBreaker:
    breaker = CircuitBreaker(limits)
    for _ in range(limits.consecutive):
        breaker.record(True, 0.0, 0.0)
    return breaker


def test_breaker_opens_on_failures_in_a_row() -> None:
    breaker = CircuitBreaker(BreakerLimits(consecutive=3))
    breaker.record(True, 0.0, 0.0)
    breaker.record(True, 0.0, 0.0)
    assert breaker.state(0.0) is BreakerState.CLOSED
    breaker.record(True, 0.0, 0.0)
    assert breaker.state(0.0) is BreakerState.OPEN


def test_breaker_opens_on_the_ratio_only_with_enough_recent_requests() -> None:
    breaker = CircuitBreaker(BreakerLimits(consecutive=100, failure_ratio=0.5, min_requests=10))
    for turn in range(9):
        breaker.record(turn % 2 == 0, 0.0, 0.0)
    assert breaker.state(0.0) is BreakerState.CLOSED
    breaker.record(True, 0.0, 0.0)
    assert breaker.state(0.0) is BreakerState.OPEN


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("now", [1.0, 6.0], ids=["open", "half open"])
def test_breaker_ignores_answers_to_requests_sent_before_it_opened(
    now: float, failed: bool
) -> None:
    breaker = opened(BreakerLimits(cool_down_s=5.0))
    breaker.record(failed, now, sent_at=-1.0)
    assert breaker.state(4.9) is BreakerState.OPEN
    assert breaker.state(6.0) is BreakerState.HALF_OPEN


def test_late_answers_count_neither_once_a_probe_has_closed_the_breaker() -> None:
    breaker = opened(BreakerLimits(cool_down_s=5.0))
    breaker.record(False, 6.0, sent_at=5.5)
    for _ in range(5):
        breaker.record(True, 30.0, sent_at=-1.0)
    assert breaker.state(30.0) is BreakerState.CLOSED
    assert breaker.consecutive == 0


def test_a_breaker_that_starts_anew_counts_only_what_is_sent_from_then_on() -> None:
    breaker = opened(BreakerLimits(consecutive=2))
    breaker.restart(1.0)
    assert breaker.state(1.0) is BreakerState.CLOSED
    for _ in range(5):
        breaker.record(True, 2.0, sent_at=0.5)
    assert (breaker.consecutive, breaker.failure_ratio) == (0, 0.0)
    for _ in range(2):
        breaker.record(True, 2.0, sent_at=1.5)
    assert breaker.state(2.0) is BreakerState.OPEN


def test_half_open_breaker_lets_one_probe_through_at_a_time() -> None:
    breaker = opened(BreakerLimits(cool_down_s=5.0))
    assert breaker.blocks(4.9, in_flight=0)
    assert not breaker.blocks(5.0, in_flight=0)
    assert breaker.blocks(5.0, in_flight=1)


def test_half_open_breaker_does_not_wait_for_ever_for_a_lost_probe() -> None:
    breaker = opened(BreakerLimits(cool_down_s=5.0))
    assert not breaker.blocks(10.0, in_flight=1)


def test_good_probe_closes_the_breaker_and_forgets_the_failures() -> None:
    breaker = opened(BreakerLimits(cool_down_s=5.0))
    breaker.record(False, 5.0, 5.0)
    assert breaker.state(5.0) is BreakerState.CLOSED
    assert breaker.failure_ratio == 0.0


def test_failed_probes_double_the_cool_down_up_to_its_bound() -> None:
    breaker = opened(BreakerLimits(cool_down_s=5.0, max_cool_down_s=15.0))
    breaker.record(True, 5.0, 5.0)
    assert breaker.state(14.9) is BreakerState.OPEN
    assert breaker.state(15.0) is BreakerState.HALF_OPEN
    breaker.record(True, 15.0, 15.0)
    assert breaker.state(29.9) is BreakerState.OPEN
    assert breaker.state(30.0) is BreakerState.HALF_OPEN


def test_window_starts_with_unknowns_not_zeros() -> None:
    clock = Clock()
    seen = SLMStats("small", clock).snapshot(clock.now)
    assert (seen.ttft_s, seen.ttft_p95_s, seen.tpot_s, seen.energy_j_per_token) == (None,) * 4


def test_window_counts_a_cold_start_but_keeps_its_wait_out_of_the_mean() -> None:
    clock = Clock()
    window = SLMStats("small", clock)
    window.observe(OK)
    window.observe(change_outcome(OK, cold=True, ttft_s=20.0, e2e_s=21.0))
    seen = window.snapshot(clock.now)
    assert seen.ttft_s == pytest.approx(0.1)
    assert seen.e2e_p95_s == 1.0
    assert seen.cold_starts == 1


def test_window_weighs_energy_per_token_by_tokens() -> None:
    clock = Clock()
    window = SLMStats("small", clock)
    window.observe(change_outcome(OK, output_tokens=1, energy_j=4.0))
    window.observe(change_outcome(OK, output_tokens=99, energy_j=96.0))
    assert window.snapshot(clock.now).energy_j_per_token == pytest.approx(1.0)


def test_statistics_report_the_time_since_the_last_outcome() -> None:
    clock = Clock()
    window = SLMStats("small", clock)
    window.observe(change_outcome(OK, queue_s=0.25))
    clock.now += 12.0
    seen = window.snapshot(clock.now)
    assert (seen.age_s, seen.queue_s, seen.requests) == (12.0, 0.25, 1)


def test_window_stays_bounded() -> None:
    window = SLMStats("small", Clock())
    for _ in range(WINDOW_SIZE * 3):
        window.observe(OK)
    assert len(window._ttft.window) == WINDOW_SIZE


@pytest.mark.parametrize(
    "outcome",
    [
        change_outcome(FAILED, status="cancelled"),
        change_outcome(FAILED, status="rejected", http_status=429),
        change_outcome(FAILED, http_status=400),
    ],
    ids=["cancelled", "rejected", "bad request"],
)
def test_what_is_not_the_slms_fault_is_no_failure(outcome: Outcome) -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    for _ in range(50):
        monitor.observe(outcome)
    assert monitor.snapshot("small", clock.now).failures == 0
    assert not monitor.state(SPEC, [], clock.now).breaker_open


def test_failures_open_the_breaker_in_the_state() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    for _ in range(5):
        monitor.observe(FAILED)
    state = monitor.state(SPEC, [ReplicaState("r1")], clock.now)
    assert state.breaker_open
    assert state.failure_ratio == 1.0


def test_attempts_served_elsewhere_open_the_breaker_too() -> None:
    clock = Clock()
    monitor = FleetStats(["small", "big"], clock)
    for _ in range(5):
        monitor.attempt_failed("small")
        monitor.observe(change_outcome(OK, slm_id="big", retries=1))
    assert monitor.state(SPEC, [], clock.now).breaker_open
    assert monitor.snapshot("small", clock.now).failures == 5


def test_half_open_state_depends_on_this_process_requests_in_flight() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    for _ in range(5):
        monitor.attempt_failed("small")
    clock.now += BreakerLimits().cool_down_s
    assert not monitor.state(SPEC, [ReplicaState("r1")], clock.now).breaker_open
    assert monitor.state(SPEC, [ReplicaState("r1", queue_length=1)], clock.now).breaker_open


def test_evidence_against_a_replica_that_is_gone_does_not_count_against_the_next() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    monitor.state(SPEC, [ReplicaState("old")], clock.now)
    for _ in range(5):
        monitor.attempt_failed("small")
    assert monitor.state(SPEC, [ReplicaState("old")], clock.now).breaker_open
    clock.now += 1.0
    assert not monitor.state(SPEC, [], clock.now).breaker_open
    clock.now += 20.0
    for _ in range(5):  # streams of the old one, that Serve has killed at last
        monitor.observe(change_outcome(FAILED, e2e_s=30.0))
    monitor.state(SPEC, [ReplicaState("new")], clock.now)
    assert monitor.breaker("small") is BreakerState.CLOSED
    assert monitor.snapshot("small", clock.now).failures == 10
    for _ in range(5):
        monitor.attempt_failed("small", took_s=0.1)
    assert monitor.breaker("small") is BreakerState.OPEN


def test_a_replica_that_joins_does_not_close_the_breaker() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    monitor.state(SPEC, [ReplicaState("r1")], clock.now)
    for _ in range(5):
        monitor.attempt_failed("small")
    both = [ReplicaState("r1"), ReplicaState("r2")]
    assert monitor.state(SPEC, both, clock.now).breaker_open


def test_a_request_that_waited_before_it_was_sent_is_a_probe_all_the_same() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    for _ in range(5):
        monitor.attempt_failed("small")
    clock.now += BreakerLimits().cool_down_s
    waited = change_outcome(OK, e2e_s=60.0)
    monitor.observe(waited)
    assert monitor.breaker("small") is BreakerState.HALF_OPEN
    monitor.observe(waited, took_s=0.5)
    assert monitor.breaker("small") is BreakerState.CLOSED


def test_state_sums_load_and_averages_ratios_over_replicas() -> None:
    clock = Clock()
    replicas = [
        ReplicaState("r1", running=3, waiting=1, kv_usage_ratio=0.2, cached_prefix_ratio=0.5),
        ReplicaState("r2", running=2, waiting=0, kv_usage_ratio=0.6, cached_prefix_ratio=0.1),
    ]
    state = FleetStats(["small"], clock).state(SPEC, replicas, clock.now)
    assert (state.residency, state.replicas) == (Residency.HOT, 2)
    assert (state.running, state.waiting, state.capacity) == (5, 1, 2 * SLOTS)
    assert (state.kv_usage_ratio, state.cached_prefix_ratio) == pytest.approx((0.4, 0.3))


def test_state_counts_requests_sent_that_no_engine_has_reported_yet() -> None:
    clock = Clock()
    burst = [ReplicaState("r1", queue_length=SLOTS + 3)]
    state = FleetStats(["small"], clock).state(SPEC, burst, clock.now)
    assert (state.running, state.waiting) == (SLOTS, 3)


def test_states_count_the_requests_of_the_whole_fleet() -> None:
    clock = Clock()
    big = SPEC.model_copy(update={"id": "big"})
    monitor = FleetStats(["small", "big"], clock)
    monitor.state(SPEC, [ReplicaState("r1", running=3)], clock.now)
    assert monitor.state(big, [ReplicaState("r2", running=2)], clock.now).in_flight == 5
    assert monitor.state(SPEC, [ReplicaState("r1", running=1)], clock.now).in_flight == 3
    monitor.remove("big")
    assert monitor.state(SPEC, [], clock.now).in_flight == 0


def test_the_state_prices_one_more_request_at_the_present_load() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    for running in (1, 4) * 40:
        joules = 10 * (0.01 + 0.08 / running)
        load = LoadAtDecision(running, running, 1.0)
        monitor.observe(change_outcome(OK, energy_j=joules, output_tokens=10, load=load))
    idle = monitor.state(SPEC, [ReplicaState("r1")], clock.now)
    busy = monitor.state(SPEC, [ReplicaState("r1", running=3)], clock.now)
    twice = monitor.state(SPEC, [ReplicaState("r1", running=3), ReplicaState("r2")], clock.now)
    assert idle.energy_j_per_token == pytest.approx(0.09, rel=0.05)
    assert busy.energy_j_per_token == pytest.approx(0.03, rel=0.05)
    assert twice.energy_j_per_token == pytest.approx(0.01 + 0.08 / 2.5, rel=0.05)


def slow_by(champion: str, slm_id: str = "small") -> Outcome:
    """An answer that took three times the TTFT that `champion` had predicted."""
    return change_outcome(
        OK,
        slm_id=slm_id,
        ttft_s=0.3,
        predicted=Prediction(slm_id, 0.5, 64.0, 0.1, 0.01, 6.4),
        load=LoadAtDecision(1, 1, 1.0),
        versions=Versions(PredictorVersion(champion), "g", "f"),
    )


def test_another_predictor_starts_without_the_last_ones_ttft_ratio() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    monitor.set_predictor(PredictorVersion("p"))
    for _ in range(20):
        monitor.observe(slow_by("p"))
    monitor.set_predictor(PredictorVersion("p", cold_start="new-1"))
    assert monitor.state(SPEC, [], clock.now).ttft_ratio == pytest.approx(3.0, rel=0.15)
    monitor.set_predictor(PredictorVersion("next"))
    monitor.observe(slow_by("p"))
    assert monitor.state(SPEC, [], clock.now).ttft_ratio == 1.0
    monitor.observe(slow_by("next"))
    assert monitor.state(SPEC, [], clock.now).ttft_ratio > 1.0


def test_an_slm_that_is_added_later_counts_the_present_predictor_only() -> None:
    clock = Clock()
    monitor = FleetStats([], clock)
    monitor.set_predictor(PredictorVersion("p"))
    monitor.add("small")
    monitor.observe(slow_by("old"))
    assert monitor.state(SPEC, [], clock.now).ttft_ratio == 1.0
    monitor.observe(slow_by("p"))
    assert monitor.state(SPEC, [], clock.now).ttft_ratio > 1.0


def test_state_without_replicas_is_that_of_the_caller() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    assert monitor.state(SPEC, [], clock.now).residency is Residency.COLD
    assert monitor.state(SPEC, [], clock.now, Residency.DEAD).residency is Residency.DEAD


def test_measured_wake_time_replaces_the_prior() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    assert monitor.state(SPEC, [], clock.now).wake_s == SPEC.priors.wake_s
    monitor.woke("small", 3.5)
    assert monitor.state(SPEC, [], clock.now).wake_s == 3.5


def test_recent_means_follow_a_change_within_a_few_half_lives() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    monitor.observe(OK)
    clock.now += 10 * HALF_LIFE_S
    monitor.observe(change_outcome(OK, ttft_s=0.9))
    assert monitor.state(SPEC, [], clock.now).ttft_s == pytest.approx(0.9, abs=0.01)


def test_slms_come_and_go_while_running() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    monitor.add("new")
    monitor.observe(change_outcome(OK, slm_id="new"))
    monitor.remove("small")
    monitor.observe(OK)
    assert monitor.slm_ids == ("new",)
    assert monitor.snapshot("new", clock.now).requests == 1


def test_adding_an_slm_twice_keeps_what_was_observed() -> None:
    clock = Clock()
    monitor = FleetStats(["small"], clock)
    monitor.observe(OK)
    monitor.add("small")
    assert monitor.snapshot("small", clock.now).requests == 1
