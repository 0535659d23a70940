"""`ReplicaRouter` inside real Ray Serve: one test per way in which a custom router can go wrong.

The SLM here only streams strings; this is about routing. Two applications run side by side:
`threads` with two router processes and Serve's default threads, `loop` with the flags that put
the router and the deployment's code on one event loop (both implied by
`RAY_SERVE_THROUGHPUT_OPTIMIZED`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import httpx
import pytest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from calm_serve.replicas.ranking import ReplicaRequest, rank_replicas
from calm_serve.types import EngineFacts, ReplicaState
from deployments.router.live_state import VIEW

SAME_LOOP = {
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
ROUTED = RequestRouterConfig(
    request_router_class="deployments.router.request_router:ReplicaRouter",
    request_router_kwargs={"exploration_ratio": 0.0},
)


@serve.deployment(
    ray_actor_options={"num_cpus": 0},
    request_router_config=ROUTED,
    graceful_shutdown_wait_loop_s=0.1,
    health_check_period_s=1,
)
class FakeSLM:
    """Streams its replica's name, then "done"."""

    def __init__(self) -> None:
        self.name = serve.get_replica_context().replica_id.unique_id

    def reconfigure(self, config: Any) -> None:
        """Accept any `user_config`."""

    async def chat(self, body: dict[str, Any], hints: Any = None) -> AsyncIterator[str]:
        if body.get("die"):
            os._exit(1)
        yield self.name
        await asyncio.sleep(body.get("hold_s", 0.0))
        yield "done"


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
class Caller:
    """Takes the place of the router deployment: makes the calls of one HTTP request."""

    def __init__(self, **slms: DeploymentHandle) -> None:
        self.slms = {name: handle.options(stream=True) for name, handle in slms.items()}

    async def __call__(self, request: Request) -> dict[str, Any]:
        plan = await request.json()
        slm = plan.get("slm", "slm")
        if learn := plan.get("learn"):
            VIEW.index(slm).add(learn["chain"], learn["replica"])
        started_s, cpu_s = time.perf_counter(), time.process_time()
        served = await asyncio.gather(*(self.call(slm, c) for c in plan["calls"]))
        return {
            "caller": os.getpid(),
            "router": type(self.slms[slm]._router).__name__,
            "served": served,
            "predicted": [VIEW.take_routed(_decision_id(c)) for c in plan["calls"]],
            "replicas": [r.replica_id for r in VIEW.replicas(slm)],
            "waiting": [r.waiting for r in VIEW.replicas(slm)],
            "queued": [r.queue_length for r in VIEW.replicas(slm)],
            "cpu_ratio": (time.process_time() - cpu_s) / (time.perf_counter() - started_s),
        }

    async def call(self, slm: str, call: dict[str, Any]) -> str:
        handle = self.slms[slm].options(session_id=call.get("session_id", ""))
        stream = handle.chat.remote(call.get("body", {}), hints=call.get("hints"))
        try:
            words = [word async for word in stream]
        except RayActorError:
            return "died"
        assert words[1:] == ["done"]
        VIEW.observe(slm, EngineFacts(words[0], waiting=3))
        return str(words[0])


def _decision_id(call: dict[str, Any]) -> str:
    hints = call.get("hints")
    return str(hints.get("decision_id", "")) if isinstance(hints, dict) else ""


def application(callers: int, env: dict[str, str], **slm_options: Any) -> serve.Application:
    # A pinned version lets a redeploy change options without restarting replicas, which is what
    # Serve does for such changes of a configuration file.
    pinned: dict[str, Any] = {"version": "1", "_internal": True}
    slm_deployment: Any = FakeSLM  # Serve ships no types
    caller_deployment: Any = Caller
    slm = slm_deployment.options(**{"num_replicas": 2, "max_ongoing_requests": 16} | slm_options)
    tiny = slm_deployment.options(name="tiny", num_replicas=1, max_ongoing_requests=2)
    caller = caller_deployment.options(
        num_replicas=callers,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": env}},
    )
    return caller.options(**pinned).bind(
        slm=slm.options(name="slm", **pinned).bind(), tiny=tiny.options(**pinned).bind()
    )


class Client:
    """Sends plans to one application's callers."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, *calls: dict[str, Any], **plan: Any) -> dict[str, Any]:
        answer = httpx.post(self._url, json={"calls": list(calls), **plan}, timeout=15.0)
        answer.raise_for_status()
        return dict(answer.json())

    def replicas(self, at_least: int = 2) -> list[str]:
        """Return the SLM's replicas once every caller that answers has the same ones."""
        deadline_s = time.monotonic() + 15.0
        agreeing: list[list[str]] = []
        while len(agreeing) < 8:
            assert time.monotonic() < deadline_s, "the callers never agreed on the replicas"
            known = sorted(self()["replicas"])
            if agreeing and known != agreeing[-1]:
                agreeing = []
            if len(known) >= at_least:
                agreeing.append(known)
            else:
                time.sleep(0.1)
        return agreeing[-1]

    def of_both_callers(self, *calls: dict[str, Any], **plan: Any) -> dict[int, dict[str, Any]]:
        """Repeat the plan until two router processes have answered it."""
        answers: dict[int, dict[str, Any]] = {}
        for _ in range(60):
            answer = self(*calls, **plan)
            answers[answer["caller"]] = answer
            if len(answers) == 2:
                return answers
        raise AssertionError("Serve sent every request to one caller")


@pytest.fixture(scope="module")
def clients(serve_cluster: str) -> dict[str, Client]:
    serve.run(application(2, {}), name="threads", route_prefix="/threads")
    serve.run(application(1, SAME_LOOP), name="loop", route_prefix="/loop")
    return {name: Client(f"{serve_cluster}/{name}/") for name in ("threads", "loop")}


@pytest.fixture(params=["threads", "loop"])
def client(request: pytest.FixtureRequest, clients: dict[str, Client]) -> Client:
    return clients[request.param]


@pytest.fixture
def routers(clients: dict[str, Client]) -> Client:
    """The application with two router processes."""
    return clients["threads"]


def preferred_replica(request: ReplicaRequest, replicas: list[str]) -> str:
    states = [ReplicaState(r, max_queue_length=16) for r in replicas]
    ranked = rank_replicas(
        request, states, {}, local_node_id="", random=Random(0), exploration_ratio=0.0
    )
    return ranked[0][0]


def evenly(field: str, replicas: list[str], each: int) -> dict[str, str]:
    """Return `each` keys per replica of which it is the preferred replica, replicas in turns.

    In turns, because a prompt that no replica has cached goes elsewhere when the first is busier.
    """
    keys: dict[str, list[str]] = {replica: [] for replica in replicas}
    for i in range(1000):
        owner = preferred_replica(ReplicaRequest(**{field: f"key{i}"}), replicas)
        keys[owner].append(f"key{i}")
    turns = zip(*(found[:each] for found in keys.values()), strict=True)
    found = {key: owner for turn in turns for owner, key in zip(keys, turn, strict=True)}
    assert len(found) == each * len(replicas)
    return found


def test_both_ways_to_run_the_router_are_under_test(clients: dict[str, Client]) -> None:
    used = {name: client()["router"] for name, client in clients.items()}
    assert used == {"threads": "SingletonThreadRouter", "loop": "CurrentLoopRouter"}


@pytest.mark.parametrize("env", [{}, SAME_LOOP], ids=["threads", "loop"])
def test_concurrent_calls_of_one_request_each_go_by_their_own_prefix(
    serve_cluster: str, env: dict[str, str]
) -> None:
    # Of its own: where a process has lately given one replica more work, it may prefer the other.
    serve.run(application(1, env), name="concurrent", route_prefix="/concurrent")
    client = Client(f"{serve_cluster}/concurrent/")
    expected = evenly("prefix_family", client.replicas(), each=4)
    calls = [
        {"hints": {"decision_id": f, "prefix_family": f, "prefix_chain": []}} for f in expected
    ]
    answer = client(*calls)
    assert answer["served"] == list(expected.values())
    assert answer["predicted"] == answer["served"]
    serve.delete("concurrent")


def test_replicas_without_requests_look_idle_at_once(client: Client) -> None:
    client.replicas()
    for _ in range(20):  # in Serve's cache of queue lengths, most rounds leave a request behind
        client(*({"hints": {"prefix_family": f"f{i}"}} for i in range(4)))
        client()  # Serve learns of the end of a call on its own loop
        assert not any(client()["queued"])


def test_an_exception_while_ranking_does_not_hang_the_request(client: Client) -> None:
    broken = {"hints": {"decision_id": "d", "prefix_family": 5, "prefix_chain": 5}}
    answer = client(broken, broken, {"hints": "not a dictionary"}, {})
    assert set(answer["served"]) <= set(client.replicas())


def test_saturated_replicas_make_requests_wait_without_burning_a_core(client: Client) -> None:
    held = [{"body": {"hold_s": 1.0}, "hints": {"prefix_family": f"f{i}"}} for i in range(6)]
    started_s = time.monotonic()
    answer = client(*held, slm="tiny")
    assert time.monotonic() - started_s > 2.9  # two at a time: three rounds of one second
    assert len(answer["served"]) == 6
    assert answer["cpu_ratio"] < 0.2  # 0.03 when backing off, 0.45 and more when spinning


def test_a_session_sticks_to_one_replica_in_every_router_process(routers: Client) -> None:
    expected = evenly("session_key", routers.replicas(), each=3)
    for session, owner in expected.items():
        named = {"hints": {"session_key": session, "prefix_family": "shared", "prefix_chain": [1]}}
        answers = [*routers.of_both_callers(named).values(), routers(named), routers(named)]
        assert [a["served"] for a in answers] == [[owner]] * 4


def test_a_serve_session_id_is_enough_to_stick(client: Client) -> None:
    client.replicas()
    served = {client({"session_id": "somebody"})["served"][0] for _ in range(8)}
    assert len(served) == 1


def test_two_router_processes_prefer_the_same_replica_for_a_new_prefix(serve_cluster: str) -> None:
    # Of its own: where a process has lately given one replica more work, it may prefer the other.
    serve.run(application(2, {}), name="agreement", route_prefix="/agreement")
    routers = Client(f"{serve_cluster}/agreement/")
    expected = evenly("prefix_family", routers.replicas(), each=1)
    for i, (family, owner) in enumerate(expected.items()):
        fresh = {"hints": {"prefix_family": family, "prefix_chain": [1000 + i]}}
        for answer in routers.of_both_callers(fresh).values():
            assert answer["served"] == [owner]
    serve.delete("agreement")


def test_engine_facts_reach_the_view_that_the_router_reads(client: Client) -> None:
    client.replicas()
    answers = [client({"hints": {"prefix_family": f"f{i}"}}) for i in range(12)]
    assert any(3 in a["waiting"] for a in answers)


def test_state_survives_a_broadcast_of_a_changed_configuration(routers: Client) -> None:
    first, second, *_ = replicas = routers.replicas()
    chain = [77, 78, 79]
    other = (
        second if preferred_replica(ReplicaRequest(prefix_family="f"), replicas) == first else first
    )
    asked = {"hints": {"prefix_family": "f", "prefix_chain": chain}}
    before = routers.of_both_callers(asked, learn={"chain": chain, "replica": other})
    assert [a["served"] for a in before.values()] == [[other], [other]]

    changed = application(2, {}, num_replicas=3, user_config={"round": 2})
    serve.run(changed, name="threads", route_prefix="/threads")
    assert {first, second} < set(routers.replicas(at_least=3))
    after = routers.of_both_callers(asked)
    assert set(after) == set(before)
    assert [a["served"] for a in after.values()] == [[other], [other]]


def test_traffic_moves_when_a_replica_dies(client: Client) -> None:
    replicas = client.replicas()
    owner = preferred_replica(ReplicaRequest(session_key="s"), replicas)
    survivors = set(replicas) - {owner}
    named: dict[str, Any] = {"hints": {"session_key": "s", "prefix_family": "f"}}
    assert client(named)["served"] == [owner]
    assert client(named | {"body": {"die": True}})["served"] == ["died"]
    answer = client(named)
    assert set(answer["served"]) <= survivors
    assert owner not in answer["replicas"]
