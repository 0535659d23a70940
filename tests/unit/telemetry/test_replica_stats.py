"""Each replica's recent past, with its age."""

from __future__ import annotations

import pytest

from calm_serve.telemetry.replica_stats import MAX_REPLICAS, ReplicaStats
from calm_serve.testing import FakeClock, make_fleet, make_outcome, make_replica
from calm_serve.types import QualitySignal
from deployments.router import fleet_view
from deployments.router.live_state import LiveView
from deployments.wire import deployment_name


def test_a_slow_replica_stands_out_beside_its_sibling() -> None:
    windows = ReplicaStats(FakeClock())
    for _ in range(20):
        windows.observe(make_outcome(replica_id="fast", tpot_s=0.01, ttft_s=0.05))
        windows.observe(make_outcome(replica_id="slow", tpot_s=0.04, ttft_s=0.2))
    fast, slow = windows.row("fast"), windows.row("slow")
    assert (fast["tpot_s"], slow["tpot_s"]) == (pytest.approx(0.01), pytest.approx(0.04))
    assert (fast["ttft_p95_s"], slow["ttft_p95_s"]) == (0.05, 0.2)


def test_a_row_has_its_age_and_its_failures() -> None:
    clock = FakeClock()
    windows = ReplicaStats(clock)
    signals = (QualitySignal("validator:json", 0.0),)
    windows.observe(make_outcome(replica_id="r", signals=signals))
    windows.observe(make_outcome(replica_id="r", status="error", ttft_s=None, tpot_s=None))
    clock.advance(7.0)
    row = windows.row("r")
    assert (row["age_s"], row["requests"], row["failures"]) == (7.0, 2, 1)
    assert (row["signal_ratio"], row["energy_j_per_token"]) == (0.0, pytest.approx(0.1))


def test_replicas_come_and_go_without_growth() -> None:
    windows = ReplicaStats(FakeClock())
    for number in range(3 * MAX_REPLICAS):
        windows.observe(make_outcome(replica_id=f"r{number}"))
    assert windows.row("r0") == {}
    assert windows.row(f"r{3 * MAX_REPLICAS - 1}")["requests"] == 1


def test_a_request_that_no_replica_served_is_ignored() -> None:
    windows = ReplicaStats(FakeClock())
    windows.observe(make_outcome(replica_id=""))
    assert windows.row("") == {}


def test_the_fleet_document_shows_live_replicas_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    live = LiveView(clock)
    monkeypatch.setattr(fleet_view, "VIEW", live)
    view = fleet_view.FleetView(make_fleet(), clock)
    live.update_replicas(deployment_name("small"), [make_replica("here", kv_usage_ratio=0.5)])
    for replica_id in ("here", "gone"):
        view.observe(make_outcome(slm_id="small", replica_id=replica_id))
    (row,) = view.snapshot({})["slms"][0]["per_replica"]
    assert (row["replica_id"], row["kv_usage_ratio"], row["requests"]) == ("here", 0.5, 1)
