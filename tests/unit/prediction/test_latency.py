"""Analytic latency and energy, and the priors, against a simulated engine with real queueing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.prediction.base import MetadataPrior, prior_prediction
from calm_serve.prediction.latency import analytic_tpot_s, analytic_ttft_s, energy_j
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import (
    EngineSimulator,
    FakeClock,
    decision_for,
    make_context,
    make_fleet,
    make_goals,
    make_spec,
    make_state,
)
from calm_serve.types import Residency

PRIORS = {"ttft_s": 0.05, "tpot_s": 0.01, "output_tokens": 50, "wake_s": 20}
SPEC = make_spec(priors={**PRIORS, "energy_j_per_token": 0.2})


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 20))
def test_first_tokens_come_later_the_more_requests_are_ahead(
    running: int, waiting: int, capacity: int
) -> None:
    now = make_state(running=running, waiting=waiting, capacity=capacity)
    worse = make_state(running=running, waiting=waiting + 1, capacity=capacity)
    assert analytic_ttft_s(SPEC, now, 100) <= analytic_ttft_s(SPEC, worse, 100)


def test_no_wait_is_predicted_while_a_slot_is_free() -> None:
    idle, almost = make_state(capacity=4), make_state(capacity=4, running=3)
    assert analytic_ttft_s(SPEC, idle, 128) == analytic_ttft_s(SPEC, almost, 128) == 0.05


def test_longer_prompts_take_longer_and_cached_ones_less() -> None:
    assert analytic_ttft_s(SPEC, make_state(), 1280) > analytic_ttft_s(SPEC, make_state(), 128)
    cached = analytic_ttft_s(SPEC, make_state(), 128, cached_ratio=1.0)
    assert 0.0 < cached < analytic_ttft_s(SPEC, make_state(), 128)


def test_an_slm_that_sleeps_takes_its_wake_up_time_measured_before_assumed() -> None:
    cold = make_state(residency=Residency.COLD, wake_s=0.0)
    measured = make_state(residency=Residency.COLD, wake_s=7.0)
    assert analytic_ttft_s(SPEC, cold, 128) == pytest.approx(20.05)
    assert analytic_ttft_s(SPEC, measured, 128) == pytest.approx(7.05)


def test_an_slm_without_capacity_still_has_a_finite_answer() -> None:
    assert 0.0 < analytic_ttft_s(SPEC, make_state(capacity=0, replicas=0), 128) < 1.0


def test_a_measured_token_time_replaces_the_prior() -> None:
    assert analytic_tpot_s(SPEC, make_state(tpot_s=0.5)) == 0.5
    assert analytic_tpot_s(SPEC, make_state()) == 0.01
    assert analytic_tpot_s(SPEC, make_state(running=16)) > 0.01


def test_energy_uses_the_measured_joules_per_token_even_when_they_are_zero() -> None:
    assert energy_j(SPEC, make_state(), 10) == pytest.approx(2.0)
    assert energy_j(SPEC, make_state(energy_j_per_token=0.5), 10) == pytest.approx(5.0)
    assert energy_j(SPEC, make_state(energy_j_per_token=0.0), 10) == 0.0


@pytest.mark.parametrize("arrivals_per_s", [2.0, 12.0, 25.0])
def test_the_analytic_wait_follows_an_engine_with_real_queueing(arrivals_per_s: float) -> None:
    # Slots turn over after 0.55 s, so 4 of them saturate at 7 requests a second.
    engine = EngineSimulator(SPEC, slots=4, jitter_ratio=0.3, seed=1)
    predicted, seen = [], []
    for i in range(60):
        at_s = i / arrivals_per_s
        state = engine.state(at_s, tpot_s=0.01)
        predicted.append(analytic_ttft_s(SPEC, state, 128))
        seen.append(engine.submit(at_s, 128, 50).ttft_s)
    ratio = sum(predicted) / sum(seen)
    assert 0.6 < ratio < 1.5


def test_equal_slms_share_a_load_that_one_could_not_carry() -> None:
    fleet = make_fleet(make_spec("a"), make_spec("b"))
    engines = {s.id: EngineSimulator(s, slots=4, jitter_ratio=0.3, seed=7) for s in fleet.slms}
    alone = EngineSimulator(fleet.slms[0], slots=4, jitter_ratio=0.3, seed=7)
    clock = FakeClock(0.0)
    target = ModelSelector(fleet, make_goals(), read_state=lambda s: engines[s.id].state(clock()))
    together, single = [], []
    for i in range(120):
        clock.advance(0.1)  # 10 a second; one engine turns over 4 slots in 0.7 s
        chosen = decision_for(target, make_context(request_id=f"r{i}")).slm_id
        together.append(engines[chosen].submit(clock(), 100, 64).ttft_s)
        single.append(alone.submit(clock(), 100, 64).ttft_s)
    assert max(together) < 0.5
    assert max(single) > 2.0


def test_the_prior_raises_quality_for_a_prompt_of_the_slms_skills() -> None:
    spec = make_spec(skills=["sql"], priors={"quality": 0.3, "skill_quality": 0.9})
    plain = prior_prediction(make_context(), spec, make_state())
    skilled = prior_prediction(make_context(markers=("a", "sql")), spec, make_state())
    assert (plain.success_ratio, skilled.success_ratio) == (0.3, 0.9)


def test_what_was_measured_scales_the_ttft_of_the_prior_but_not_the_wake_up() -> None:
    asleep = make_state(residency=Residency.ASLEEP, wake_s=7.0, ttft_ratio=3.0, ttft_spread=0.2)
    found = prior_prediction(make_context(prompt_tokens=128), SPEC, asleep)
    assert found.ttft_s == pytest.approx(7.15)
    assert found.ttft_spread == 0.2


def test_the_prior_answer_is_no_longer_than_the_client_allows() -> None:
    short = prior_prediction(make_context(max_output_tokens=5), SPEC, make_state())
    assert short.output_tokens == 5.0
    assert short.energy_j == pytest.approx(1.0)


def test_specs_and_states_must_run_parallel() -> None:
    with pytest.raises(ValueError, match="shorter"):
        MetadataPrior().predict(make_context(), [SPEC, SPEC], [make_state()])
