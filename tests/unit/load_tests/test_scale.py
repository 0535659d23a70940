"""The `scale` benchmark measures what it says: its router, its cluster, its sizes and its views."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from calm_serve.config import Fleet
from calm_serve.prediction.base import MetadataPrior
from calm_serve.testing import FakeClock, make_facts, make_fleet, make_outcome, make_replica
from deployments.router.live_state import FACTS_LIFETIME_S
from load_tests.scale import simulation
from load_tests.scale.benchmark import conclusions
from load_tests.scale.curves import (
    OFFERED,
    REPLICAS,
    ReplicaCase,
    cost,
    exponent,
)
from load_tests.scale.router import QueueCache, RouterProcess
from load_tests.scale.simulation import (
    Cluster,
    Simulation,
    Traffic,
    spread,
)
from load_tests.scale.staleness import Balance, Setting, settings
from load_tests.scale.state import sizes

BODY = b'{"model": "auto", "messages": [{"role": "user", "content": "hello"}]}'


@pytest.fixture(autouse=True)
def _plain_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(path: str, chars: int, rng: Random, fleet: Fleet) -> bytes:
        return BODY.replace(b"hello", b"h" * rng.randrange(1, chars))

    monkeypatch.setattr(simulation, "body", body)


def simulate(seed: int = 1, requests: int = 300) -> Simulation:
    fleet = make_fleet()
    cluster = Cluster(fleet, {"small": 2, "large": 2}, 1.0, seed)
    simulation = Simulation(fleet, MetadataPrior(), cluster, routers=2, rate_rps=40.0, seed=seed)
    for _ in range(requests):
        simulation.step()
    return simulation


def test_a_queue_cache_counts_own_calls_and_forgets_what_is_too_old() -> None:
    clock = FakeClock()
    cache = QueueCache(clock)
    assert cache.get("a") is None
    cache.finished("a")
    assert cache.get("a") is None
    cache.report("a", 2)
    cache.finished("a")
    assert cache.get("a") == 1
    clock.advance(FACTS_LIFETIME_S + 0.1)
    assert cache.get("a") is None


def test_a_router_process_decides_ranks_and_remembers() -> None:
    clock = FakeClock()
    states = {i: [make_replica(f"{i}-{k}") for k in range(3)] for i in ("small", "large")}
    router = RouterProcess(make_fleet(), MetadataPrior(), states, clock, Random(0))
    decision = router.decide(BODY, {"x-session-id": "s"}, "d1")
    ranking = [r for group in router.rank(decision) for r in group]
    assert sorted(ranking) == [f"{decision.slm_id}-{k}" for k in range(3)]
    router.accepted(decision, ranking[0], 4)
    assert router.queues.get(ranking[0]) == 4
    assert len(router.view.estimator(f"slm-{decision.slm_id}").index) == 1
    router.finished(make_outcome("d1", slm_id=decision.slm_id), make_facts(ranking[0]))
    assert router.queues.get(ranking[0]) == 3
    assert router.stats.snapshot(decision.slm_id, clock()).requests == 1


def test_a_router_process_keeps_a_state_for_as_long_as_the_fleet_view() -> None:
    clock = FakeClock()
    states = {i: [make_replica(i)] for i in ("small", "large")}
    router = RouterProcess(make_fleet(), MetadataPrior(), states, clock, Random(0))
    spec = router.selector.specs["small"]
    before = router.state(spec)
    router.queues.report("small", 9)
    assert router.state(spec) is before
    clock.advance(0.1)
    assert router.state(spec).running == 9


def test_equal_seeds_give_equal_simulations() -> None:
    first, again, other = simulate(), simulate(), simulate(seed=2)
    assert first.record.wait_s == again.record.wait_s
    assert first.record.wait_s != other.record.wait_s
    assert len(first.record.decide_ns) == len(first.record.choose_ns) == 300


def test_answers_come_back_to_the_router_that_sent_them() -> None:
    simulation = simulate(requests=1)
    done = [o for _ in range(800) for o in simulation.step()]
    assert len({o.outcome_id for o in done}) == len(done) > 100
    seen = sum(
        r.stats.snapshot(slm, simulation.clock()).requests
        for r in simulation.routers
        for slm in ("small", "large")
    )
    assert seen == len(done)


def test_no_replica_takes_more_than_its_limit_while_another_has_room() -> None:
    simulation = simulate(requests=600)
    assert simulation.record.overflows == 0
    now = simulation.clock()
    for engine in simulation._cluster.engines.values():
        assert engine.replica(now).queue_length <= engine.spec.limits.max_ongoing_requests


def test_traffic_repeats_some_prompts_and_some_sessions() -> None:
    traffic = Traffic(make_fleet(), 3)
    sent = [next(traffic) for _ in range(1000)]
    assert len(sent) - len({raw for raw, _ in sent}) > 80
    assert 150 < sum(bool(headers) for _, headers in sent) < 250


def test_replicas_are_shared_out_completely_and_every_slm_has_one() -> None:
    shares = spread(make_fleet(), MetadataPrior(), 10, seed=1)
    assert sum(shares.values()) == 10
    assert min(shares.values()) >= 1
    with pytest.raises(ValueError, match="cannot hold"):
        spread(make_fleet(), MetadataPrior(), 1, seed=1)


def test_sizes_count_every_object_once_and_leave_shared_ones_out() -> None:
    shared = [f"shared {i}" for i in range(1000)]
    both = [f"both {i}" for i in range(100)]
    parts: dict[str, Any] = {
        "first": SimpleNamespace(shared=shared, both=both),
        "second": SimpleNamespace(both=both, own=deque(range(5000, 5010))),
    }
    found = sizes(parts, (shared,))
    assert 100 < found["first"][1] < 200
    assert 10 < found["second"][1] < 30
    assert found["first"][0] > 100 * 50
    grown = sizes({"first": SimpleNamespace(both=[*both, "more of it"])}, (shared,))
    assert grown["first"][1] < found["first"][1] + 10


@pytest.mark.parametrize("shared", [False, True])
def test_a_replica_case_can_be_asked_again_and_again(shared: bool) -> None:
    case = ReplicaCase(8, shared, seed=1)
    assert all(case.choose(i) >= 0 for i in range(5))


def test_the_exponent_tells_flat_from_linear_from_quadratic() -> None:
    sizes_ = (4, 16, 64)
    assert exponent(sizes_, [5.0] * 3) == pytest.approx(0.0, abs=1e-9)
    assert exponent(sizes_, [3.0 * n for n in sizes_]) == pytest.approx(1.0)
    assert exponent(sizes_, [2.0 * n * n for n in sizes_]) == pytest.approx(2.0)
    assert cost("a", [1000, 2000, 3000])["a.p50_us"] == 2.0


def test_old_views_are_the_same_every_time_and_worse_than_the_truth() -> None:
    least = Balance(Setting("least"), 1500, seed=1).run()
    assert least == Balance(Setting("least"), 1500, seed=1).run()
    fresh = Balance(Setting("live_view"), 1500, seed=1).run()
    blind = Balance(Setting("random"), 1500, seed=1).run()
    assert least["waiting_share"] <= fresh["waiting_share"]
    assert least["mean_wait_ms"] < blind["mean_wait_ms"]
    assert fresh["sent_to_full_share"] == 0.0 < blind["sent_to_full_share"]


def test_one_process_that_counts_its_own_calls_needs_no_snapshot() -> None:
    fresh = Balance(Setting("live_view"), 800, seed=1).run()
    assert Balance(Setting("live_view", 10.0, 1), 800, seed=1).run() == fresh
    assert Balance(Setting("served", 0.0, 1), 800, seed=1).run() == fresh


def test_a_snapshot_has_the_load_at_its_publication() -> None:
    balance = Balance(Setting("reports", 1.0, 1), 0, seed=1)
    balance._advance(0.5)
    balance._arrive(0)
    assert sum(balance._view(0)) == 0
    ends = balance._completions[0][0]
    balance._completions[0] = (max(ends, 1.5), *balance._completions[0][1:])
    balance._advance(1.2)
    assert sum(balance._view(0)) == 1
    balance._advance(balance._completions[0][0] + 1.0)
    assert sum(balance._view(0)) == 0


def test_every_setting_has_its_own_name() -> None:
    names = [s.name for s in settings()]
    assert len(set(names)) == len(names)
    assert replace(Setting("live_view"), age_s=0.01).name == "staleness.live_view.1.10ms"


def test_the_conclusions_are_ratios_and_slopes_of_the_curves() -> None:
    figures = {f"offered.{max(OFFERED)}.decide.{k}": 300.0 for k in ("p50_us", "p99_us")}
    figures |= {f"candidates.{n}.p50_us": 10.0 * n for n in (4, 8, 16, 32)}
    for case in ("new", "shared"):
        figures |= {f"replicas.{n}.{case}.p50_us": 2.0 * n for n in REPLICAS}
    for tenth, factor in ((1, 1.0), (5, 2.0), (10, 2.2)):
        figures |= {f"seen.{tenth}.{s}.p50_us": 50.0 * factor for s in ("decide", "choose")}
        figures[f"seen.{tenth}.state_bytes"] = 1000 * factor
    waits = {"live_view.1.0ms": 200.0, "live_view.8.1000ms": 300.0, "reports.8.1000ms": 500.0}
    figures |= {f"staleness.{name}.p99_wait_ms": wait for name, wait in waits.items()}
    found = conclusions(figures)
    assert found["staleness_p99_wait_ratio_1s"] == 1.5
    assert found["staleness_reports_p99_wait_ratio_1s"] == 2.5
    assert found["decision_p50_us_at_100000_rps"] == 300.0
    assert found["requests_seen_cost_ratio"] == 2.2
    assert found["state_growth_ratio"] == 1.1
    assert found["candidates_exponent"] == found["replicas_exponent"] == 1.0
