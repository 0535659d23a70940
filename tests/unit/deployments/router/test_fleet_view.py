"""A router's view of the fleet: states, readiness, SLMs that join and leave."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.protocol.reports import ReplicaReport
from calm_serve.protocol.topics import DesiredResidency
from calm_serve.telemetry.circuit_breaker import BreakerLimits
from calm_serve.testing import FakeClock, make_fleet, make_outcome, make_replica, make_spec
from calm_serve.types import Residency
from deployments.router import fleet_view
from deployments.router.fleet_view import STATE_LIFETIME_S, FleetView
from deployments.router.live_state import LiveView
from deployments.wire import deployment_name

HOT = make_spec("hot")
COLD = make_spec("cold", residency="on_demand", scaling={"min_replicas": 0})
FLEET = make_fleet(HOT, COLD)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> LiveView:
    live = LiveView(clock)
    monkeypatch.setattr(fleet_view, "VIEW", live)
    return live


@pytest.fixture
def view(live: LiveView, clock: FakeClock) -> FleetView:
    return FleetView(FLEET, clock)


def set_replicas(live: LiveView, slm_id: str, *replicas: Any) -> None:
    live.update_replicas(deployment_name(slm_id), replicas)


def row(view: FleetView, slm_id: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = view.snapshot({})["slms"]
    return next(r for r in rows if r["id"] == slm_id)


def test_before_the_first_replica_a_hot_slm_starts_and_another_is_cold(view: FleetView) -> None:
    assert view.state(HOT).residency is Residency.STARTING
    assert view.state(COLD).residency is Residency.COLD
    assert view.states() == {"hot": "pending", "cold": "cold"}


def test_readiness_needs_hot_slms_only_and_stays(view: FleetView, live: LiveView) -> None:
    assert not view.refresh_ready()
    set_replicas(live, "cold", make_replica())
    assert not view.refresh_ready()
    set_replicas(live, "hot", make_replica())
    assert view.refresh_ready()
    set_replicas(live, "hot")
    assert view.refresh_ready()


def test_a_hot_slm_that_was_up_and_is_gone_is_dead(
    view: FleetView, live: LiveView, clock: FakeClock
) -> None:
    set_replicas(live, "hot", make_replica())
    set_replicas(live, "cold", make_replica())
    view.refresh_ready()
    assert view.states() == {"hot": "hot", "cold": "hot"}
    set_replicas(live, "hot")
    set_replicas(live, "cold")
    clock.advance(2 * STATE_LIFETIME_S)
    assert view.states() == {"hot": "dead", "cold": "cold"}
    assert view.state(HOT).residency is Residency.DEAD
    assert view.state(COLD).residency is Residency.COLD


def test_a_state_is_computed_once_within_its_lifetime(
    view: FleetView, live: LiveView, clock: FakeClock
) -> None:
    first = view.state(HOT)
    set_replicas(live, "hot", make_replica())
    assert view.state(HOT) is first
    clock.advance(2 * STATE_LIFETIME_S)
    assert view.state(HOT).replicas == 1


def test_load_is_summed_over_replicas(view: FleetView, live: LiveView) -> None:
    set_replicas(live, "hot", make_replica("a", running=2), make_replica("b", running=3))
    state = view.state(HOT)
    assert (state.replicas, state.running) == (2, 5)
    assert state.capacity == 2 * HOT.limits.max_num_seqs


def test_failed_attempts_open_the_breaker_at_once(view: FleetView, live: LiveView) -> None:
    set_replicas(live, "hot", make_replica())
    assert not view.state(HOT).breaker_open
    for _ in range(BreakerLimits().consecutive):
        view.attempt_failed("hot")
    assert view.state(HOT).breaker_open
    assert view.states()["hot"] == "degraded"


def test_an_slm_is_hot_again_when_a_probe_has_succeeded_and_not_when_one_may_be_sent(
    view: FleetView, live: LiveView, clock: FakeClock
) -> None:
    set_replicas(live, "hot", make_replica())
    for _ in range(BreakerLimits().consecutive):
        view.attempt_failed("hot")
    clock.advance(BreakerLimits().cool_down_s)
    assert not view.state(HOT).breaker_open  # so that a probe is sent
    assert view.states()["hot"] == "degraded"
    before = make_outcome(slm_id="hot", e2e_s=60.0)
    view.observe(before, took_s=60.0)  # sent before the breaker opened
    assert view.states()["hot"] == "degraded"
    view.observe(make_outcome(slm_id="hot", e2e_s=60.0), took_s=0.1)
    assert view.states()["hot"] == "hot"


def test_a_replica_that_reports_a_dead_engine_is_left_out_at_once_and_its_successor_is_hot(
    view: FleetView, live: LiveView, clock: FakeClock
) -> None:
    set_replicas(live, "hot", make_replica("a"))
    view.refresh_ready()
    assert view.states()["hot"] == "hot"
    for _ in range(BreakerLimits().consecutive):
        view.attempt_failed("hot")
    view.set_reports({"hot": {"a": ReplicaReport("failed", detail="died: killed", at=1.0)}})
    set_replicas(live, "hot", make_replica("a"))  # Serve still lists it
    assert view.states()["hot"] == "dead"
    assert (row(view, "hot")["replicas"], row(view, "hot")["detail"]) == (0, "died: killed")
    clock.advance(1.0)
    set_replicas(live, "hot", make_replica("a"), make_replica("b"))
    assert view.states()["hot"] == "hot"
    assert [r["replica_id"] for r in row(view, "hot")["per_replica"]] == ["b"]


def test_outcomes_feed_the_state_and_those_of_strangers_do_not(
    view: FleetView, live: LiveView
) -> None:
    set_replicas(live, "hot", make_replica())
    view.observe(make_outcome(slm_id="hot", ttft_s=0.25))
    view.observe(make_outcome(slm_id="stranger"))
    assert view.state(HOT).ttft_s == pytest.approx(0.25)
    assert row(view, "hot")["requests"] == 1
    assert {s["id"] for s in view.snapshot({})["slms"]} == {"hot", "cold"}


def test_an_slm_that_joins_is_observed_and_one_that_leaves_is_dropped(
    view: FleetView, live: LiveView, clock: FakeClock
) -> None:
    new = make_spec("new")
    view.set_fleet(make_fleet(HOT, COLD, new))
    set_replicas(live, "new", make_replica())
    view.observe(make_outcome(slm_id="new"))
    assert row(view, "new")["requests"] == 1
    view.refresh_ready()
    view.set_fleet(FLEET)
    view.observe(make_outcome(slm_id="new"))
    view.attempt_failed("new")
    assert set(view.states()) == {"hot", "cold"}
    set_replicas(live, "new")
    view.set_fleet(make_fleet(HOT, COLD, new))
    assert view.states()["new"] == "pending"
    assert row(view, "new")["requests"] == 0


def test_the_newest_start_up_report_of_an_slm_is_shown(view: FleetView) -> None:
    view.set_reports(
        {
            "hot": {
                "a": ReplicaReport("warming up", {"engine": 3.0}, at=2.0),
                "b": ReplicaReport("failed", detail="out of memory", at=1.0),
            },
            "cold": {},
        }
    )
    assert view.states()["hot"] == "warming up"
    assert row(view, "hot")["ready_s"] == {"engine": 3.0}
    assert row(view, "cold")["ready_s"] == {}


def test_a_failed_start_shows_its_reason(view: FleetView) -> None:
    view.set_reports({"hot": {"a": ReplicaReport("failed", detail="no weights", at=1.0)}})
    shown = row(view, "hot")
    assert (shown["state"], shown["detail"]) == ("failed", "no weights")


def test_memory_and_adapters_are_those_of_all_replicas(view: FleetView, live: LiveView) -> None:
    set_replicas(
        live,
        "hot",
        make_replica("a", memory_bytes=3, adapters=("sql",)),
        make_replica("b", memory_bytes=4, adapters=("json", "sql")),
    )
    shown = row(view, "hot")
    assert (shown["memory_bytes"], shown["resident_adapters"]) == (7, ["json", "sql"])


def test_the_fleet_document_has_the_predictor_it_is_given(view: FleetView) -> None:
    document = view.snapshot({"version": "v"})
    assert (document["ready"], document["predictor"]) == (False, {"version": "v"})


Reports = dict[str, dict[str, ReplicaReport]]


def reported(state: str, **ready_s: float) -> Reports:
    return {"hot": {"a": ReplicaReport(state, ready_s, at=1.0)}}


def test_an_slm_that_sleeps_runs_nothing_whatever_its_last_answer_reported(
    view: FleetView, live: LiveView
) -> None:
    set_replicas(live, "hot", make_replica("a", running=1, waiting=2, kv_usage_ratio=0.3))
    view.set_desired_residency(DesiredResidency({"hot": Residency.ASLEEP}), 1)
    view.set_reports(reported("ready"))
    assert row(view, "hot")["running"] == 1  # it still answers
    view.set_reports(reported("asleep"))
    shown = row(view, "hot")
    assert (shown["running"], shown["waiting"], shown["kv_usage_ratio"]) == (0, 0, 0.0)
    assert shown["per_replica"][0]["running"] == 0


@pytest.mark.parametrize(
    "reports",
    [
        [reported("ready"), reported("asleep", wake=0.2)],
        [reported("ready"), reported("waking")],
        [
            reported("ready", wake=0.2),
            reported("ready", wake=0.3),
        ],  # the sleep between was overwritten
    ],
)
def test_the_prefixes_of_a_replica_that_slept_are_forgotten(
    view: FleetView, live: LiveView, reports: list[Reports]
) -> None:
    set_replicas(live, "hot", make_replica("a"))
    view.set_reports(reports[0])
    index = live.estimator(deployment_name("hot")).index
    index.add((1, 2, 3), "a")
    for repeated in (reports[0], reports[1]):
        assert index.match((1, 2, 3)) == {"a": 3}
        view.set_reports(repeated)
    assert index.match((1, 2, 3)) == {}


def test_prefixes_that_were_served_since_waking_are_kept(view: FleetView, live: LiveView) -> None:
    set_replicas(live, "hot", make_replica("a"))
    view.set_reports(reported("asleep"))
    index = live.estimator(deployment_name("hot")).index
    index.add((1, 2, 3), "a")
    view.set_reports(reported("waking"))
    view.set_reports(reported("ready", wake=0.3))
    assert index.match((1, 2, 3)) == {"a": 3}
