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
from deployments.wire import Hints

SLM = DeploymentID(name="slm", app_name="app")


class FakeReplica:
    """What `ReplicaRouter` and its base class read of a `RunningReplica`."""

    def __init__(self, name: str, **stats: Any) -> None:
        self.replica_id = ReplicaID(name, SLM)
        self.node_id = "node"
        self.max_ongoing_requests = 8
        self.multiplexed_model_ids: set[str] = set()
        self.routing_stats = stats
        self.replica_metadata = {"url": f"http://{name}", "secret": f"secret of {name}"}
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


def hints(**fields: Any) -> Hints:
    empty: dict[str, Any] = {
        "decision_id": "d",
        "prefix_family": "",
        "prefix_chain": (),
        "session_key": "",
        "adapter": "",
    }
    made: Any = empty | fields
    return made  # type: ignore[no-any-return]


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

    asyncio.run(run())
    assert not ray.is_initialized()


def order(router: ReplicaRouter, request: Hints) -> list[str]:
    """Return all replicas in the order in which a request would try them."""
    tried: list[str] = []
    while (chosen := router.choose(request, tried)) is not None:
        tried.append(chosen.replica_id)
    return tried


def test_a_chosen_replica_comes_with_its_address(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        chosen = router.choose(hints())
        assert chosen is not None
        assert chosen.address == {"url": "http://a", "secret": "secret of a"}
        assert view.chooser("slm") is router

    routing([FakeReplica("a")], story)


def test_a_replica_without_an_address_gets_nothing(view: LiveView) -> None:
    deaf = FakeReplica("a")
    deaf.replica_metadata = {}

    async def story(router: ReplicaRouter) -> None:
        assert order(router, hints()) == ["b"]

    routing([deaf, FakeReplica("b")], story)


def test_a_prompt_goes_to_the_replica_that_was_sent_its_prefix(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        request = hints(prefix_family="f", prefix_chain=(1, 2))
        last = order(router, request)[-1]
        router.sent(last, request)
        router.finished(last)
        assert order(router, request)[0] == last

    routing([FakeReplica("a"), FakeReplica("b"), FakeReplica("c")], story)


def test_a_request_without_affinity_goes_to_the_least_loaded_replica(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        router.sent("a", hints())
        router.sent("a", hints())
        router.sent("b", hints())
        assert order(router, hints()) == ["b", "a"]
        router.finished("a")
        router.finished("a")
        assert order(router, hints()) == ["a", "b"]

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_requests_of_other_routers_count_as_a_replica_reports_them(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        router.sent("a", hints())
        router.answered("a", hints(), accepted=True, ongoing=5)
        router.finished("a")
        router.sent("b", hints())
        assert order(router, hints()) == ["b", "a"]

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_an_unknown_queue_length_is_taken_from_the_engine(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        router.on_replica_actor_unavailable(ReplicaID("a", SLM))
        router.on_replica_actor_unavailable(ReplicaID("b", SLM))
        view.observe("slm", EngineFacts("a", running=3, waiting=1))
        view.observe("slm", EngineFacts("b", running=3))
        assert order(router, hints()) == ["b", "a"]

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_a_replica_that_has_the_adapter_comes_first(view: LiveView) -> None:
    holder = FakeReplica("b")
    holder.multiplexed_model_ids = {"sql"}

    async def story(router: ReplicaRouter) -> None:
        assert order(router, hints(adapter="sql"))[0] == "b"

    routing([FakeReplica("a"), holder, FakeReplica("c")], story)


def test_a_replica_that_is_missing_in_the_view_is_still_ranked(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        view.update_replicas("slm", [])
        assert sorted(order(router, hints())) == ["a", "b"]

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_a_replica_that_is_known_to_be_dead_gets_nothing_while_another_one_lives(
    view: LiveView,
) -> None:
    both = [FakeReplica("a"), FakeReplica("b")]

    async def story(router: ReplicaRouter) -> None:
        view.died("slm", "a")
        router.update_replicas(both)  # type: ignore[arg-type]  # Serve still lists it
        assert order(router, hints(prefix_family="f")) == ["b"]
        view.died("slm", "b")  # either refuses sooner than a new one starts
        assert sorted(order(router, hints())) == ["a", "b"]

    routing(both, story)


def test_replicas_and_polled_statistics_are_published_to_the_view(view: LiveView) -> None:
    replica = FakeReplica("a", running=2, waiting=1, kv_usage_ratio=0.25)
    replica.queue_length = 3
    broken = FakeReplica("b", running="many", kv_usage_ratio=float("nan"))

    async def story(router: ReplicaRouter) -> None:
        first, second = view.replicas("slm")
        assert (first.queue_length, first.max_queue_length, first.node_id) == (3, 8, "node")
        assert (first.running, first.waiting, first.kv_usage_ratio) == (2, 1, 0.25)
        assert (second.running, second.kv_usage_ratio) == (0, 0.0)

    routing([replica, broken], story)


def test_a_dead_replica_leaves_router_and_view(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        router.on_replica_actor_died(ReplicaID("a", SLM))
        assert [r.replica_id for r in view.replicas("slm")] == ["b"]
        assert order(router, hints()) == ["b"]

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_a_call_of_the_handle_backs_off_and_goes_to_any_live_replica(view: LiveView) -> None:
    async def story(router: ReplicaRouter) -> None:
        view.died("slm", "a")
        call = PendingRequest(args=[], kwargs={}, metadata=RequestMetadata("r", "internal"))
        groups = await router.choose_replicas(list(router.curr_replicas.values()), call)
        assert [[r.replica_id.unique_id for r in group] for group in groups] == [["b"]]
        assert call.routing_context.should_backoff

    routing([FakeReplica("a"), FakeReplica("b")], story)


def test_a_retry_avoids_the_replica_that_failed_although_it_has_the_prefix(
    view: LiveView,
) -> None:
    async def story(router: ReplicaRouter) -> None:
        request = hints(prefix_family="f", prefix_chain=(1, 2))
        first = order(router, request)[0]
        router.sent(first, request)
        again = order(router, hints(**{**request, "avoid": first}))
        assert again[-1] == first

    routing([FakeReplica("a"), FakeReplica("b"), FakeReplica("c")], story)


def test_a_misspelt_router_argument_is_an_error() -> None:
    async def run() -> None:
        router = ReplicaRouter(SLM, DeploymentHandleSource.UNKNOWN)
        with pytest.raises(TypeError, match="exploration"):
            router.initialize_state(exploration=0.1)  # type: ignore[call-arg]

    asyncio.run(run())


def test_replicas_tell_of_prompts_that_other_routers_sent(view: LiveView) -> None:
    other = FakeReplica("b", recent_prompts=[((2, 3), 96)])

    async def story(router: ReplicaRouter) -> None:
        request = hints(prefix_family="f", prefix_chain=(1, 2, 3, 4), prompt_tokens=128)
        assert order(router, request)[0] == "b"

    routing([FakeReplica("a"), other, FakeReplica("c")], story)
    assert view.estimator("slm").index.match((1, 2, 3, 4)) == {"b": 3}


@pytest.mark.parametrize("malformed", [5, [5], [((1,), "many")], [("ab", 1)], [(1, 2, 3)]])
def test_malformed_reports_of_prompts_are_ignored(view: LiveView, malformed: Any) -> None:
    async def story(router: ReplicaRouter) -> None:
        assert order(router, hints()) == ["a"]

    routing([FakeReplica("a", recent_prompts=malformed)], story)
    assert len(view.estimator("slm").index) == 0


def test_a_request_is_work_ahead_from_its_sending_on_unless_it_is_refused(
    view: LiveView,
) -> None:
    """Not from the answer's beginning on: by then the prefill is done."""

    async def story(router: ReplicaRouter) -> None:
        def first_of_ten() -> set[str]:
            requests = [hints(decision_id=f"d{n}", prefix_family=f"f{n}") for n in range(10)]
            return {order(router, request)[0] for request in requests}

        assert first_of_ten() == {"a", "b"}
        long = hints(decision_id="long", prompt_tokens=50_000)
        router.sent("a", long)
        assert first_of_ten() == {"b"}
        router.answered("a", long, accepted=False, ongoing=0)
        router.finished("a")
        assert first_of_ten() == {"a", "b"}

    routing([FakeReplica("a"), FakeReplica("b")], story)
