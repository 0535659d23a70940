"""The residency coordinator: reports become desired residency, within the budget."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from calm_serve.config import ResidencyOptions
from calm_serve.protocol.reports import DemandReply, DemandReport, ResidencySummary
from calm_serve.residency.coordinator import (
    GONE_AFTER_S,
    MISSING_REPLICA_PATIENCE_S,
    READY_PATIENCE_S,
    RESIDENCY_KEY,
    RESTART_PATIENCE_S,
    ROUTER_EXPIRY_S,
    SETTINGS,
    ResidencyCoordinator,
)
from calm_serve.testing import FakeClock, make_spec
from calm_serve.types import Residency

SIZE = 100
IDS = ("a", "b", "c")


def spec(slm_id: str, **fields: Any) -> Any:
    return make_spec(slm_id, resources={"kv_cache_bytes": SIZE, "weights_bytes": 0}, **fields)


class Fleet:
    """A coordinator, one router and one replica per SLM, which report what a test says."""

    def __init__(self, budget: int | None = 2 * SIZE, store: Store | None = None) -> None:
        self.clock, self.store = FakeClock(), store or Store()
        self.published: list[dict[str, Residency]] = []
        self.coordinator = ResidencyCoordinator(
            self.store, lambda desired: self.published.append(desired.tiers), self.clock
        )
        self.coordinator.set_slms([spec(i) for i in IDS])
        self.options = ResidencyOptions(memory_budget_bytes=budget, min_resident_s=0.5)

    def deploy(self) -> Fleet:
        self.store.texts[RESIDENCY_KEY] = self.coordinator.configure(self.options, 0.2, 0.02)
        return self

    def up(self) -> Fleet:
        """Every replica has started and followed its first desired residency; a and b are hot."""
        self.deploy()
        for slm_id in IDS:
            self.report(slm_id, "ready")
        self.report("c", "asleep")
        self.report_demand()
        self.later(5.0)
        return self

    def report(self, slm_id: str, state: str, **times: float) -> None:
        self.coordinator.report(slm_id, f"{slm_id}-1", state, times)

    def report_demand(
        self, *arrivals: str, queued: dict[str, int] | None = None, gone: str = "", **more: Any
    ) -> DemandReply:
        replicas = {i: {f"{i}-1": "node"} for i in IDS if i != gone}
        report = DemandReport(arrivals, queued or {}, **{"replicas": replicas, **more})
        return self.coordinator.report_demand("router", report)

    def summary(self) -> ResidencySummary:
        summary = self.coordinator.summary()
        assert summary is not None
        return summary

    def later(self, seconds: float) -> None:
        for _ in range(round(seconds * 2)):
            self.clock.advance(0.5)
            self.report_demand()

    @property
    def hot(self) -> set[str]:
        return {i for i, tier in self.published[-1].items() if tier == "hot"}


class Store:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def meta(self, key: str) -> str | None:
        return self.texts.get(key)


def test_without_a_budget_nothing_is_published() -> None:
    fleet = Fleet(None).deploy()
    fleet.report("a", "ready")
    assert fleet.report_demand("a") == DemandReply()
    assert fleet.published == []


def test_desired_residency_is_published_before_any_replica_is_up() -> None:
    assert Fleet().deploy().hot == {"a", "b"}


def test_a_wake_up_waits_for_the_report_of_the_evicted_replica() -> None:
    fleet = Fleet().up()
    fleet.report_demand("a", "c", queued={"c": 1})
    assert fleet.hot == {"a"}
    fleet.clock.advance(0.02)
    fleet.report("b", "asleep", sleep=0.02)
    assert fleet.hot == {"a", "c"}
    assert fleet.summary().hot_bytes <= 2 * SIZE


def test_a_dead_replica_without_replacement_frees_its_memory() -> None:
    fleet = Fleet().up()
    may_go = {"residency": "on_demand", "scaling": {"min_replicas": 0}}
    fleet.coordinator.set_slms([spec(i, **may_go) for i in IDS])
    fleet.report_demand("a", "c", queued={"c": 1})
    for _ in range(round(GONE_AFTER_S / 0.5) + 1):
        fleet.clock.advance(0.5)
        fleet.report_demand(queued={"c": 1}, gone="b")
    assert fleet.hot == {"a", "c"}


def test_a_replica_that_died_before_the_budget_was_set_takes_no_memory() -> None:
    fleet = Fleet(budget=None).deploy()
    for slm_id in IDS:
        fleet.report(slm_id, "ready")
    fleet.coordinator.report("a", "a-0", "ready", {})  # a second replica, which dies
    fleet.clock.advance(READY_PATIENCE_S + 1.0)
    fleet.options = ResidencyOptions(memory_budget_bytes=3 * SIZE, min_resident_s=0.5)
    fleet.deploy()
    fleet.report_demand()
    assert fleet.summary().hot_bytes == 3 * SIZE


def test_a_sleeping_replica_that_a_list_left_out_for_a_while_is_still_asleep() -> None:
    fleet = Fleet().up()  # c is asleep
    for _ in range(round(GONE_AFTER_S / 0.5) + 1):
        fleet.clock.advance(0.5)
        fleet.report_demand(gone="c")
    fleet.report_demand()
    assert fleet.summary().hot_bytes == 2 * SIZE


def test_starts_that_failed_take_no_memory() -> None:
    fleet = Fleet().up()
    for replica_id in ("a-2", "a-3"):
        fleet.coordinator.report("a", replica_id, "failed", {})
    fleet.report_demand()
    assert fleet.summary().hot_bytes == 2 * SIZE  # a and b


def test_a_replica_that_a_request_woke_keeps_others_asleep() -> None:
    fleet = Fleet().up()
    fleet.report_demand("a", "c", queued={"c": 1})
    fleet.report("b", "waking")
    fleet.clock.advance(0.1)
    fleet.report_demand(queued={"c": 1})
    assert fleet.hot == {"a"}


def test_the_time_to_wake_is_measured_from_the_plan_to_the_report() -> None:
    fleet = Fleet().up()
    fleet.report_demand("c", queued={"c": 1})
    fleet.clock.advance(0.1)
    fleet.report("b", "asleep")
    fleet.clock.advance(0.3)
    fleet.report("c", "ready", wake=0.3)
    waits = fleet.report_demand().waits
    assert waits["b"] == pytest.approx(0.4)  # as measured on c: a may leave at once


def test_a_first_start_is_no_wake_up() -> None:
    fleet = Fleet().deploy()
    fleet.clock.advance(20.0)
    fleet.report("a", "ready", total=20.0)
    fleet.report("b", "ready", total=20.0)
    assert fleet.report_demand().waits["c"] < 5.0


def test_after_a_restart_nothing_is_published_before_the_replicas_report() -> None:
    store = Fleet().up().store
    fleet = Fleet(store=store)
    fleet.report_demand(queued={"a": 1})
    assert fleet.published == []
    fleet.report("b", "ready")
    fleet.report("c", "ready")
    fleet.report("a", "asleep")
    fleet.report_demand()
    assert fleet.hot == {"b", "c"}


def test_after_a_restart_replicas_that_do_not_report_count_as_hot() -> None:
    fleet = Fleet(store=Fleet().up().store)
    fleet.report_demand()
    fleet.clock.advance(RESTART_PATIENCE_S + 0.1)
    fleet.report_demand()
    assert fleet.summary().hot_bytes == 3 * SIZE
    assert len(fleet.hot) == 2


def test_a_deployment_without_a_budget_wakes_every_slm() -> None:
    fleet = Fleet().up()
    fleet.options = ResidencyOptions()
    fleet.deploy()
    assert fleet.published[-1] == {}
    assert SETTINGS.decode(fleet.store.texts[RESIDENCY_KEY]).options.memory_budget_bytes is None


def stored_by_the_former_build(text: str) -> str:
    return json.dumps(json.loads(text)["record"])


def test_settings_of_the_former_build_are_read() -> None:
    store = Fleet().deploy().store
    document = json.loads(store.texts[RESIDENCY_KEY])
    assert (document["format"], document["version"]) == ("residency_settings", 1)
    store.texts[RESIDENCY_KEY] = stored_by_the_former_build(store.texts[RESIDENCY_KEY])
    assert Fleet(store=store).summary().budget_bytes == 2 * SIZE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": "residency_settings", "version": 2, "record": {}}', "a newer program"),
        ('{"options": {"gone_field": 1}, "latency_per_s": 1.0, "energy_per_j": 1.0}', "gone_field"),
        ("{", "not JSON"),
    ],
)
def test_settings_that_cannot_be_read_are_ignored_named_in_the_log_and_kept(
    text: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    store.texts[RESIDENCY_KEY] = text
    with caplog.at_level(logging.ERROR):
        assert Fleet(store=store).coordinator.summary() is None
    assert RESIDENCY_KEY in caplog.text and reason in caplog.text
    assert store.texts[RESIDENCY_KEY] == text


def test_queues_of_a_router_that_stopped_reporting_are_dropped() -> None:
    fleet = Fleet().up()
    fleet.report_demand(queued={"c": 3})
    assert fleet.summary().queued_requests == 3
    fleet.clock.advance(ROUTER_EXPIRY_S + 0.1)
    fleet.coordinator.step()
    assert fleet.summary().queued_requests == 0


def test_hits_of_all_routers_are_counted() -> None:
    fleet = Fleet().up()
    fleet.report_demand(hits=3, misses=1)
    fleet.report_demand(hits=1, misses=0)
    found = fleet.summary()
    assert (found.hits, found.misses, found.hit_ratio) == (4, 1, 0.8)
    assert found.recent_hit_ratio == pytest.approx(0.8)


def test_the_start_above_the_budget_is_no_peak() -> None:
    fleet = Fleet().deploy()
    for slm_id in IDS:
        fleet.report(slm_id, "warming up")
    fleet.report_demand()
    assert fleet.summary().peak_bytes == 0
    for slm_id, state in zip(IDS, ("ready", "ready", "asleep"), strict=True):
        fleet.report(slm_id, state)
    fleet.report_demand()
    assert fleet.summary().peak_bytes == 2 * SIZE


def test_a_budget_set_at_run_time_has_no_peak_before_it_is_reached() -> None:
    fleet = Fleet().up()
    fleet.coordinator.configure(ResidencyOptions(memory_budget_bytes=SIZE), 0.2, 0.02)
    assert (fleet.summary().hot_bytes, fleet.summary().peak_bytes) == (2 * SIZE, 0)
    fleet.later(1.0)
    fleet.report("b", "asleep")
    fleet.report_demand()
    assert fleet.summary().peak_bytes == SIZE


def test_a_remote_slm_is_not_planned() -> None:
    fleet = Fleet().deploy()
    remote = {"locality": "remote", "remote": {"base_url": "http://far/v1"}}
    fleet.coordinator.set_slms([spec("a"), make_spec("far", **remote)])
    assert set(fleet.published[-1]) == {"a"}


def test_an_slm_on_two_nodes_counts_on_both() -> None:
    fleet = Fleet(SIZE)
    fleet.coordinator.set_slms(
        [spec("a", scaling={"min_replicas": 2, "max_replicas": 2}), spec("b")]
    )
    fleet.deploy()
    replicas = {"a": {"a-1": "one", "a-2": "two"}, "b": {"b-1": "two"}}
    for replica_id in ("a-1", "a-2"):
        fleet.coordinator.report("a", replica_id, "ready", {})
    fleet.coordinator.report("b", "b-1", "asleep", {})
    fleet.report_demand(replicas=replicas)
    assert fleet.summary().hot_bytes == SIZE
    assert len(fleet.hot) == 1


def test_a_missing_replica_counts_as_starting() -> None:
    fleet = Fleet().up()
    for _ in range(round(GONE_AFTER_S / 0.5) + 1):
        fleet.clock.advance(0.5)
        fleet.report_demand(gone="a")  # a has died, and Serve starts another one
    assert fleet.summary().hot_bytes == 2 * SIZE  # with b
    fleet.clock.advance(MISSING_REPLICA_PATIENCE_S)
    fleet.report_demand(gone="a")
    assert fleet.summary().hot_bytes == SIZE
    fleet.coordinator.report("a", "a-2", "importing", {})
    fleet.report_demand(gone="a")
    assert fleet.summary().hot_bytes == 2 * SIZE


def test_no_slm_is_woken_into_the_memory_of_a_starting_replica() -> None:
    fleet = Fleet().up()
    fleet.report_demand("a", "c", queued={"c": 1})
    fleet.report("b", "asleep")
    fleet.report("c", "ready", wake=0.1)
    assert fleet.hot == {"a", "c"}
    for _ in range(round(GONE_AFTER_S / 0.5) + 1):
        fleet.clock.advance(0.5)
        fleet.report_demand(gone="b")  # b was asleep and has died
    for _ in range(4):
        fleet.clock.advance(0.5)
        fleet.report_demand("b", queued={"b": 1}, gone="b")
        assert len(fleet.hot) <= 2
        assert fleet.summary().hot_bytes == 3 * SIZE  # observed: it loads before it sleeps
