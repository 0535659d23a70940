"""The residency desk: what routers and replicas say becomes orders, never more than the budget."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calm_serve.config import ResidencyOptions
from calm_serve.residency.coordinator import (
    GONE_AFTER_S,
    OWED_PATIENCE_S,
    RESIDENCY_KEY,
    RESTART_PATIENCE_S,
    ROUTER_EXPIRY_S,
    ResidencyCoordinator,
)
from calm_serve.testing import FakeClock, make_spec

SIZE = 100
IDS = ("a", "b", "c")


def spec(slm_id: str, **fields: Any) -> Any:
    return make_spec(slm_id, resources={"kv_cache_bytes": SIZE, "weights_bytes": 0}, **fields)


class Fleet:
    """Replicas that obey, and one router, around a desk."""

    def __init__(self, budget: int | None = 2 * SIZE, store: Store | None = None) -> None:
        self.clock, self.store = FakeClock(), store or Store()
        self.orders: list[dict[str, str]] = []
        self.desk = ResidencyCoordinator(
            self.store, lambda v: self.orders.append(v["tiers"]), self.clock
        )
        self.desk.set_slms([spec(i) for i in IDS])
        self.options = ResidencyOptions(memory_budget_bytes=budget, min_resident_s=0.5)

    def deploy(self) -> Fleet:
        self.store.texts[RESIDENCY_KEY] = self.desk.configure(self.options, 0.2, 0.02)
        return self

    def up(self) -> Fleet:
        """Every replica has started and obeyed its first order; a and b are hot."""
        self.deploy()
        for slm_id in IDS:
            self.report(slm_id, "ready")
        self.report("c", "asleep")
        self.want()
        self.later(5.0)
        return self

    def report(self, slm_id: str, state: str, **times: float) -> None:
        self.desk.report(slm_id, f"{slm_id}-1", state, times)

    def want(
        self, *wanted: str, held: dict[str, int] | None = None, gone: str = "", **more: Any
    ) -> dict[str, Any]:
        said = {
            "wanted": wanted,
            "held": held or {},
            "running": {},
            "replicas": {i: {f"{i}-1": "node"} for i in IDS if i != gone},
            "hits": 0,
            "misses": 0,
            **more,
        }
        return self.desk.want("router", said)

    def later(self, seconds: float) -> None:
        for _ in range(round(seconds * 2)):
            self.clock.advance(0.5)
            self.want()

    @property
    def hot(self) -> set[str]:
        return {i for i, tier in self.orders[-1].items() if tier == "hot"}


class Store:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def meta(self, key: str) -> str | None:
        return self.texts.get(key)


def test_without_a_budget_the_desk_is_silent() -> None:
    fleet = Fleet(None).deploy()
    fleet.report("a", "ready")
    assert fleet.want("a") == {"waits": {}}
    assert fleet.orders == []


def test_the_first_orders_are_there_before_any_replica() -> None:
    assert Fleet().deploy().hot == {"a", "b"}


def test_a_wake_up_waits_for_the_report_of_the_one_that_gives_way() -> None:
    fleet = Fleet().up()
    fleet.want("a", "c", held={"c": 1})
    assert fleet.hot == {"a"}
    fleet.clock.advance(0.02)
    fleet.report("b", "asleep", sleep=0.02)
    assert fleet.hot == {"a", "c"}
    assert fleet.want()["hot_bytes"] <= 2 * SIZE


def test_a_replica_that_died_and_is_not_replaced_makes_room_like_one_that_sleeps() -> None:
    fleet = Fleet().up()
    may_go = {"residency": "on_demand", "scaling": {"min_replicas": 0}}
    fleet.desk.set_slms([spec(i, **may_go) for i in IDS])
    fleet.want("a", "c", held={"c": 1})
    for _ in range(round(GONE_AFTER_S / 0.5) + 1):
        fleet.clock.advance(0.5)
        fleet.want(held={"c": 1}, gone="b")
    assert fleet.hot == {"a", "c"}


def test_a_replica_that_woke_without_an_order_keeps_others_asleep() -> None:
    fleet = Fleet().up()
    fleet.want("a", "c", held={"c": 1})
    fleet.report("b", "waking")
    fleet.clock.advance(0.1)
    fleet.want(held={"c": 1})
    assert fleet.hot == {"a"}


def test_the_time_to_wake_is_measured_from_the_plan_to_the_report() -> None:
    fleet = Fleet().up()
    fleet.want("c", held={"c": 1})
    fleet.clock.advance(0.1)
    fleet.report("b", "asleep")
    fleet.clock.advance(0.3)
    fleet.report("c", "ready", wake=0.3)
    waits = fleet.want()["waits"]
    assert waits["b"] == pytest.approx(0.4)  # as measured on c: a may leave at once


def test_a_first_start_is_no_wake_up() -> None:
    fleet = Fleet().deploy()
    fleet.clock.advance(20.0)
    fleet.report("a", "ready", total=20.0)
    fleet.report("b", "ready", total=20.0)
    assert fleet.want()["waits"]["c"] < 5.0


def test_after_a_restart_nobody_is_ordered_before_the_replicas_have_spoken() -> None:
    store = Fleet().up().store
    fleet = Fleet(store=store)
    fleet.want(held={"a": 1})
    assert fleet.orders == []
    fleet.report("b", "ready")
    fleet.report("c", "ready")
    fleet.report("a", "asleep")
    fleet.want()
    assert fleet.hot == {"b", "c"}


def test_after_a_restart_silence_is_taken_for_hot() -> None:
    fleet = Fleet(store=Fleet().up().store)
    fleet.want()
    fleet.clock.advance(RESTART_PATIENCE_S + 0.1)
    answer = fleet.want()
    assert answer["hot_bytes"] == 3 * SIZE
    assert len(fleet.hot) == 2


def test_a_deployment_without_a_budget_wakes_everybody() -> None:
    fleet = Fleet().up()
    fleet.options = ResidencyOptions()
    fleet.deploy()
    assert fleet.orders[-1] == {}
    assert json.loads(fleet.store.texts[RESIDENCY_KEY])["options"]["memory_budget_bytes"] is None


def test_a_router_that_fell_silent_waits_for_nothing() -> None:
    fleet = Fleet().up()
    fleet.want(held={"c": 3})
    assert fleet.desk.summary()["held_requests"] == 3
    fleet.clock.advance(ROUTER_EXPIRY_S + 0.1)
    fleet.desk.step()
    assert fleet.desk.summary()["held_requests"] == 0


def test_hits_of_all_routers_are_counted() -> None:
    fleet = Fleet().up()
    fleet.want(hits=3, misses=1)
    answer = fleet.want(hits=1, misses=0)
    assert (answer["hits"], answer["misses"], answer["hit_ratio"]) == (4, 1, 0.8)
    assert answer["recent_hit_ratio"] == pytest.approx(0.8)


def test_starting_up_above_the_budget_is_no_peak() -> None:
    fleet = Fleet().deploy()
    for slm_id in IDS:
        fleet.report(slm_id, "warming up")
    assert fleet.want()["peak_bytes"] == 0
    for slm_id, state in zip(IDS, ("ready", "ready", "asleep"), strict=True):
        fleet.report(slm_id, state)
    assert fleet.want()["peak_bytes"] == 2 * SIZE


def test_a_remote_slm_is_not_planned() -> None:
    fleet = Fleet().deploy()
    remote = {"locality": "remote", "remote": {"base_url": "http://far/v1"}}
    fleet.desk.set_slms([spec("a"), make_spec("far", **remote)])
    assert set(fleet.orders[-1]) == {"a"}


def test_an_slm_on_two_nodes_counts_on_both() -> None:
    fleet = Fleet(SIZE)
    fleet.desk.set_slms([spec("a", scaling={"min_replicas": 2, "max_replicas": 2}), spec("b")])
    fleet.deploy()
    replicas = {"a": {"a-1": "one", "a-2": "two"}, "b": {"b-1": "two"}}
    for replica_id in ("a-1", "a-2"):
        fleet.desk.report("a", replica_id, "ready", {})
    fleet.desk.report("b", "b-1", "asleep", {})
    answer = fleet.want(replicas=replicas)
    assert answer["hot_bytes"] == SIZE
    assert len(fleet.hot) == 1


def test_a_replica_counts_from_when_it_is_ordered() -> None:
    fleet = Fleet().up()
    for _ in range(round(GONE_AFTER_S / 0.5) + 1):
        fleet.clock.advance(0.5)
        answer = fleet.want(gone="a")  # a has died, and Serve starts another one
    assert answer["hot_bytes"] == 2 * SIZE  # with b
    fleet.clock.advance(OWED_PATIENCE_S)
    assert fleet.want(gone="a")["hot_bytes"] == SIZE
    fleet.desk.report("a", "a-2", "importing", {})
    assert fleet.want(gone="a")["hot_bytes"] == 2 * SIZE


def test_nobody_is_woken_into_the_memory_of_a_replica_that_starts() -> None:
    fleet = Fleet().up()
    fleet.want("a", "c", held={"c": 1})
    fleet.report("b", "asleep")
    fleet.report("c", "ready", wake=0.1)
    assert fleet.hot == {"a", "c"}
    for _ in range(round(GONE_AFTER_S / 0.5) + 1):
        fleet.clock.advance(0.5)
        fleet.want(gone="b")  # b was asleep and has died
    for _ in range(4):
        fleet.clock.advance(0.5)
        fleet.want("b", held={"b": 1}, gone="b")
        assert len(fleet.hot) <= 2
        assert fleet.desk.summary()["hot_bytes"] == 3 * SIZE  # as a fact: it loads before it sleeps
