"""The Serve router class against hand-written replicas; no cluster, no actors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import ray
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from calm_serve.types import EngineFacts
from deployments.router import live_state
from deployments.router.live_state import LiveView
from deployments.router.request_router import ReplicaRouter

SLM = DeploymentID(name="slm", app_name="app")


class FakeReplica:
    """What `ReplicaRouter` and its base class read of a `RunningReplica`."""

    def __init__(self, name: str, **stats: Any) -> None:
        self.replica_id = ReplicaID(name, SLM)
        self.node_id = "node"
        self.max_ongoing_requests = 8
        self.multiplexed_model_ids: set[str] = set()
        self.routing_stats = stats
        self.queue_length = 0
        self.probes = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        assert deadline_s > 0
        self.probes += 1
        return self.queue_length


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> LiveView:
    view = LiveView(lambda: 0.0)
    monkeypatch.setattr(live_state, "VIEW", view)
    return view


def pending(
    hints: Any = None, *, request_id: str = "r", model_id: str = "", session_id: str = ""
) -> PendingRequest:
    metadata = RequestMetadata(
        request_id=request_id,
        internal_request_id="one HTTP request",
        multiplexed_model_id=model_id,
        session_id=session_id,
    )
    return PendingRequest(
        args=[{}], kwargs={} if hints is None else {"hints": hints}, metadata=metadata
    )


def hints(**fields: Any) -> dict[str, Any]:
    empty = {
        "decision_id": "d",
        "prefix_family": "",
        "prefix_chain": (),
        "session_key": "",
        "adapter": "",
    }
    return empty | fields


def routing(
    replicas: Sequence[FakeReplica], story: Callable[[ReplicaRouter], Awaitable[None]]
) -> None:
    """Run `story` against a router with `replicas`, as Serve would: on one event loop."""

    async def run() -> None:
        router = ReplicaRouter(SLM, DeploymentHandleSource.UNKNOWN, None, None, True)
        router.initialize_state(exploration_ratio=0.0)
        router.update_replicas(list(replicas))
        await asyncio.sleep(0)  # lets the base class's first queue-length probes run
        await asyncio.sleep(0)
        await story(router)
        assert router._pending_by_metadata == {}

    asyncio.run(run())
    assert not ray.is_initialized()


def names(groups: list[list[Any]]) -> list[list[str]]:
    return [[r.replica_id.unique_id for r in group] for group in groups]


async def choose(router: ReplicaRouter, request: PendingRequest | None) -> list[list[str]]:
    return names(await router.choose_replicas(list(router.curr_replicas.values()), request))


def test_a_prompt_goes_to_the_replica_that_served_its_prefix(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        request = hints(prefix_family="f", prefix_chain=(1, 2))
        last = (await choose(router, pending(request)))[-1][0]
        router.on_request_routed(pending(request), ReplicaID(last, SLM), None)
        assert (await choose(router, pending(request)))[0] == [last]

    routing([FakeReplica("a"), FakeReplica("b"), FakeReplica("c")], story)


def test_a_call_without_hints_goes_to_the_least_loaded_replica(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        router.on_new_queue_len_info(ReplicaID("a", SLM), 2)
        router.on_new_queue_len_info(ReplicaID("b", SLM), 1)
        assert await choose(router, pending()) == [["b"], ["a"]]

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_serve_session_ids_and_model_ids_stand_in_for_missing_hints(view: LiveView) -> None:
    holder = FakeReplica("b")
    holder.multiplexed_model_ids = {"sql"}

    async def story(router: ReplicaRouter) -> None:
        by_session = [await choose(router, pending(session_id="s", request_id=i)) for i in "xyz"]
        assert by_session[0] == by_session[1] == by_session[2]
        assert (await choose(router, pending(model_id="sql")))[0] == ["b"]

    routing([FakeReplica("a"), holder, FakeReplica("c")], story)


def test_an_unknown_queue_length_is_taken_from_the_engine(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        router.on_replica_actor_unavailable(ReplicaID("a", SLM))
        router.on_replica_actor_unavailable(ReplicaID("b", SLM))
        view.observe("slm", EngineFacts("a", running=3, waiting=1))
        view.observe("slm", EngineFacts("b", running=3))
        assert await choose(router, pending()) == [["b"], ["a"]]

    routing([FakeReplica("a"), FakeReplica("b")], story)


@pytest.mark.parametrize(
    "malformed", [{"prefix_family": 5}, {"prefix_chain": 5}, {"prefix_chain": [[]]}, "text"]
)
def test_malformed_hints_fall_back_to_all_candidates(view: LiveView, malformed: Any) -> None:
    async def story(router: ReplicaRouter) -> None:
        request = pending(malformed)
        assert await choose(router, request) == [["a", "b"]]
        assert request.routing_context.should_backoff

    view.index("slm").add((1,), "a")
    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_malformed_hints_do_not_fail_an_accepted_request(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        request = pending({"prefix_chain": 5})
        router.on_request_routed(request, ReplicaID("a", SLM), None)

    routing([FakeReplica("a")], story)


def test_every_request_backs_off_and_every_candidate_stays_in_the_answer(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        for name in "abc":
            router.on_new_queue_len_info(ReplicaID(name, SLM), 8)
        request = pending(hints(prefix_family="f"))
        (group,) = await choose(router, request)
        assert sorted(group) == ["a", "b", "c"]
        assert request.routing_context.should_backoff
        assert await choose(router, None) == [["a", "b", "c"]]

    routing([FakeReplica("a"), FakeReplica("b"), FakeReplica("c")], story)


def test_a_candidate_that_is_missing_in_the_view_is_still_ranked(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        view.update_replicas("slm", [])
        assert sorted(await choose(router, pending())) == [["a"], ["b"]]

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_a_replica_that_is_known_to_be_dead_gets_nothing_while_another_one_lives(
    view: LiveView,
) -> None:
    both = [FakeReplica("a"), FakeReplica("b")]

    async def story(router: ReplicaRouter) -> None:
        view.died("slm", "a")
        router.update_replicas(both)  # type: ignore[arg-type]  # Serve still lists it
        assert await choose(router, pending(hints(prefix_family="f"))) == [["b"]]
        assert await choose(router, None) == [["b"]]
        view.died("slm", "b")  # either refuses sooner than a new one starts
        assert sorted(await choose(router, pending())) == [["a"], ["b"]]

    routing(both, story)


def test_the_preferred_replica_is_published_for_the_outcome(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        request = pending(hints(prefix_family="f", decision_id="d7"))
        (best,), (other,) = await choose(router, request)
        router.on_new_queue_len_info(ReplicaID(best, SLM), 8)
        assert (await choose(router, request))[0] == [other]  # the same request, retried
        assert view.take_routed("d7") == best

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_replicas_and_polled_statistics_are_published_to_the_view(view: LiveView) -> None:
    replica = FakeReplica("a", running=2, waiting=1, kv_usage_ratio=0.25)
    broken = FakeReplica("b", running="many", kv_usage_ratio=float("nan"))

    async def story(router: ReplicaRouter) -> None:
        router.on_new_queue_len_info(ReplicaID("a", SLM), 3)
        first, second = view.replicas("slm")
        assert (first.queue_length, first.max_queue_length, first.node_id) == (3, 8, "node")
        assert (first.running, first.waiting, first.kv_usage_ratio) == (2, 1, 0.25)
        assert (second.running, second.kv_usage_ratio) == (0, 0.0)

    routing([replica, broken], story)


def test_a_dead_replica_leaves_router_and_view(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        router.on_replica_actor_died(ReplicaID("a", SLM))
        assert [r.replica_id for r in view.replicas("slm")] == ["b"]
        assert await choose(router, pending()) == [["b"]]

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_concurrent_calls_of_one_request_all_get_the_replica_of_their_own_prefix(
    view: LiveView,
) -> None:
    async def story(router: ReplicaRouter) -> None:
        router.max_num_routing_tasks_cap = 2
        calls = [pending(hints(prefix_family=f"f{i}")) for i in range(12)]
        expected = [(await choose(router, call))[0][0] for call in calls]
        assert set(expected) == {"a", "b"}
        for call in calls:
            call.routing_context.should_backoff = False
        chosen = await asyncio.wait_for(
            asyncio.gather(*(router._choose_replica_for_request(c) for c in calls)), timeout=5
        )
        assert [r.replica_id.unique_id for r in chosen] == expected

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_cancelled_and_fulfilled_requests_leave_nothing_behind(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        full = [pending(hints(), model_id="sql") for _ in range(4)]
        tasks = [asyncio.create_task(router._choose_replica_for_request(p)) for p in full]
        for _ in range(20):  # long enough for every request to reach the replica
            await asyncio.sleep(0)
        assert replica.probes > 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        replica.queue_length = 0
        for _ in range(4):
            await router._choose_replica_for_request(pending(hints(), model_id="sql"))
        assert router._pending_requests_by_id == {}
        assert sum(map(len, router._pending_requests_by_model_id.values())) == 0

    replica = FakeReplica("a")
    replica.queue_length = 8
    routing([replica], story)


def test_a_retry_avoids_the_replica_that_failed_although_it_has_the_prefix(
    view: LiveView,
) -> None:
    async def story(router: ReplicaRouter) -> None:
        request = hints(prefix_family="f", prefix_chain=(1, 2))
        first = (await choose(router, pending(request)))[0][0]
        router.on_request_routed(pending(request), ReplicaID(first, SLM), None)
        again = await choose(router, pending(hints(**request, avoid=first)))
        assert again[0] != [first]
        assert again[-1] == [first]
        assert view.take_routed("d") == again[0][0]

    routing([FakeReplica("a"), FakeReplica("b"), FakeReplica("c")], story)


def test_a_misspelt_router_argument_is_an_error() -> None:
    async def run() -> None:
        router = ReplicaRouter(SLM, DeploymentHandleSource.UNKNOWN)
        with pytest.raises(TypeError, match="exploration"):
            router.initialize_state(exploration=0.1)  # type: ignore[call-arg]

    asyncio.run(run())
