"""Replica choice and Serve's books in real Ray Serve; requests go to the replicas' own ports.

The SLM here only streams strings; this is about choosing, counting, draining and adapters. Two
applications run side by side: `threads` with two router processes and Serve's default threads,
`loop` with the flags that put request router, replica and its HTTP server on one event loop (both
implied by `RAY_SERVE_THROUGHPUT_OPTIMIZED`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from random import Random
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from calm_serve.errors import CapacityError
from calm_serve.protocol.answers import ANSWER_END, ANSWER_REQUEST, AnswerEnd, AnswerRequest
from calm_serve.replicas import FirstTokenEstimator, ReplicaRequest, rank_for_prompt
from calm_serve.testing import make_spec
from calm_serve.types import EngineFacts, ReplicaState
from calm_serve.upstreams import UpstreamError
from deployments.router.live_state import VIEW
from deployments.router.upstream import Upstream
from deployments.slm.http_server import HttpServer
from deployments.slm.serve_account import FullError, ServeAccount
from deployments.wire import (
    END_EVENT,
    NO_ANSWER_HEADER,
    ONGOING_HEADER,
    REQUEST_HEADER,
    SECRET_HEADER,
    NoAnswer,
    ReplyEnd,
    deployment_name,
)

SAME_LOOP = {
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
ROUTED = RequestRouterConfig(
    request_router_class="deployments.router.request_router:ReplicaRouter",
    request_router_kwargs={"exploration_ratio": 0.0},
)
SECRET = "of this test"
SLM, TINY = deployment_name("slm"), deployment_name("tiny")


@serve.deployment(
    ray_actor_options={"num_cpus": 0},
    request_router_config=ROUTED,
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=20,
    health_check_period_s=1,
)
class FakeSLM:
    """Streams its replica's name, then "done", over a port of its own."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits constructors
        context = serve.get_replica_context()
        self.name = context.replica_id.unique_id
        self.account = ServeAccount(context.app_name)
        self.loaded: list[str] = []
        self.server = HttpServer(self.answer, "127.0.0.1")
        await self.server.start()

    def record_replica_metadata(self) -> dict[str, Any]:
        return {"url": self.server.url, "secret": SECRET}

    def reconfigure(self, config: Any) -> None:
        """Accept any `user_config`."""

    async def url(self) -> str:
        """Where it listens."""
        return self.server.url

    async def books(self) -> dict[str, Any]:
        """Serve's count without this call, and the adapters in memory."""
        return {"ongoing": self.account.ongoing - 1, "loaded": list(self.loaded)}

    @serve.multiplexed(max_num_models_per_replica=1)  # type: ignore[untyped-decorator]
    async def load_adapter(self, name: str) -> Adapter:
        self.loaded.append(name)
        return Adapter(name, self.loaded)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if headers.get(SECRET_HEADER.encode()) != SECRET.encode():
            await document(send, 401)
            return
        asked = ANSWER_REQUEST.decode(headers[REQUEST_HEADER.encode()])
        try:
            async with self.account.request(
                route=scope["path"], request_id="r", adapter=asked.adapter
            ):
                if asked.adapter:
                    await self.load_adapter(asked.adapter)
                await self.stream(await body_of(receive), receive, send)
        except FullError:
            await document(send, 503, (NO_ANSWER_HEADER.encode(), NoAnswer.FULL.encode()))

    async def stream(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        if body.get("die"):
            os._exit(1)
        ongoing = (ONGOING_HEADER.encode(), str(self.account.ongoing).encode())
        kind = (b"content-type", b"text/event-stream")
        await send({"type": "http.response.start", "status": 200, "headers": [kind, ongoing]})
        await part(send, self.name.encode() + b"\n\n")
        left = asyncio.ensure_future(receive())  # the client's disconnection
        await asyncio.wait({left}, timeout=body.get("hold_s", 0.0))
        if left.done():
            return
        left.cancel()
        await part(send, b"done\n\n")
        end = AnswerEnd(EngineFacts(self.name, waiting=3))
        await part(send, END_EVENT + ANSWER_END.encode(end) + b"\n\n", more=False)


class Adapter:
    """A loaded adapter that notes its unloading."""

    def __init__(self, name: str, loaded: list[str]) -> None:
        self.name, self.loaded = name, loaded

    def __del__(self) -> None:
        if self.name in self.loaded:
            self.loaded.remove(self.name)


async def document(send: Any, status: int, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await part(send, b"{}", more=False)


async def part(send: Any, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def body_of(receive: Any) -> dict[str, Any]:
    import json

    raw = b""
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            found: dict[str, Any] = json.loads(raw)
            return found


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
class Caller:
    """Takes the place of the router deployment: makes the calls of one HTTP request."""

    async def __init__(self, **slms: DeploymentHandle) -> None:  # type: ignore[misc]
        self.slms = slms
        for handle in slms.values():
            handle._init()
        self.upstream = Upstream(
            spec=make_spec,
            start_replica=lambda _slm: None,
            clock=time.monotonic,
            random=lambda: 0.0,
        )

    async def __call__(self, request: Request) -> dict[str, Any]:
        plan = await request.json()
        slm = plan.get("slm", "slm")
        name = deployment_name(slm)
        if learn := plan.get("learn"):
            VIEW.estimator(name).index.add(learn["chain"], learn["replica"])
        started_s, cpu_s = time.perf_counter(), time.process_time()
        served = await asyncio.gather(*(self.call(slm, c) for c in plan["calls"]))
        return {
            "caller": os.getpid(),
            "router": type(self.slms[slm]._router).__name__,
            "served": served,
            "predicted": [VIEW.take_routed(_decision_id(c)) for c in plan["calls"]],
            "replicas": [r.replica_id for r in VIEW.replicas(name)],
            "adapters": {r.replica_id: r.adapters for r in VIEW.replicas(name)},
            "waiting": [r.waiting for r in VIEW.replicas(name)],
            "queued": [r.queue_length for r in VIEW.replicas(name)],
            "cpu_ratio": (time.process_time() - cpu_s) / (time.perf_counter() - started_s),
        }

    async def call(self, slm: str, call: dict[str, Any]) -> str:
        hints = call.get("hints", {})
        asked = AnswerRequest(hints.get("decision_id", ""), adapter=hints.get("adapter", ""))
        reply = self.upstream.call(slm, "/v1/x", call.get("body", {}), asked, hints)
        try:
            items = [item async for item in reply]
        except UpstreamError:
            return "died"
        except CapacityError:
            return "full"
        assert isinstance(items[-1], ReplyEnd), items
        words = b"".join(items[:-1]).split()
        assert words[1:] == [b"done"]
        VIEW.observe(deployment_name(slm), items[-1].facts)
        return words[0].decode()


def _decision_id(call: dict[str, Any]) -> str:
    return str(call.get("hints", {}).get("decision_id", ""))


def application(callers: int, env: dict[str, str], **slm_options: Any) -> serve.Application:
    # A pinned version lets a redeploy change options without restarting replicas, which is what
    # Serve does for such changes of a configuration file.
    pinned: dict[str, Any] = {"version": "1", "_internal": True}
    slm_deployment: Any = FakeSLM  # Serve ships no types
    caller_deployment: Any = Caller
    slm = slm_deployment.options(**{"num_replicas": 2, "max_ongoing_requests": 16} | slm_options)
    tiny = slm_deployment.options(name=TINY, num_replicas=1, max_ongoing_requests=2)
    caller = caller_deployment.options(
        num_replicas=callers,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": env}},
    )
    return caller.options(**pinned).bind(
        slm=slm.options(name=SLM, **pinned).bind(), tiny=tiny.options(**pinned).bind()
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
        """Repeat the plan until two router processes have answered it; the first answer of each.

        A process that is asked again has given the first replica work, and may prefer the other.
        """
        answers: dict[int, dict[str, Any]] = {}
        for _ in range(60):
            answer = self(*calls, **plan)
            answers.setdefault(answer["caller"], answer)
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
    estimator = FirstTokenEstimator(1, lambda: 0.0)
    ranked = rank_for_prompt(
        request, (), states, estimator, local_node_id="", random=Random(0), exploration_ratio=0.0
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


def test_two_router_processes_prefer_the_same_replica_for_a_new_prefix(serve_cluster: str) -> None:
    # Of its own: where a process has lately given one replica more work, it may prefer the other.
    serve.run(application(2, {}), name="agreement", route_prefix="/agreement")
    routers = Client(f"{serve_cluster}/agreement/")
    # Not the first replica, and one prefix only, for the same reason.
    family, owner = list(evenly("prefix_family", routers.replicas(), each=1).items())[-1]
    fresh = {"hints": {"prefix_family": family, "prefix_chain": [1000]}}
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
    # Its port is closed, so each router's next request finds out; none waits for health checks.
    served = [client(named)["served"] for _ in range(5)]
    assert served.count(["died"]) <= 2
    assert set(served[-1]) <= survivors


class Books:
    """Serve's books of the SLM of an application of its own."""

    def __init__(self, name: str, url: str, **slm_options: Any) -> None:
        serve.run(
            application(1, SAME_LOOP, **({"num_replicas": 1} | slm_options)),
            name=name,
            route_prefix=f"/{name}",
        )
        self.client = Client(f"{url}/{name}/")
        self.client.replicas(at_least=1)
        self._handle = serve.get_deployment_handle(SLM, name)

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = self._handle.books.remote().result(timeout_s=10)
        return found

    def until(self, ongoing: int, within_s: float) -> None:
        deadline_s = time.monotonic() + within_s
        while (read := self.read()["ongoing"]) != ongoing:
            assert time.monotonic() < deadline_s, f"{read} ongoing requests instead of {ongoing}"
            time.sleep(0.05)

    def hold(self, streams: int, hold_s: float) -> tuple[threading.Thread, list[Any]]:
        """Open streams in the background; the list gets the answer, or the exception."""
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(self.client(*[{"body": {"hold_s": hold_s}}] * streams))
            except httpx.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        return thread, answers


def test_serve_counts_the_open_streams(serve_cluster: str) -> None:
    books = Books("counted", serve_cluster)
    thread, answers = books.hold(streams=5, hold_s=2.0)
    books.until(ongoing=5, within_s=2.0)
    thread.join()
    books.until(ongoing=0, within_s=2.0)
    assert len(answers[0]["served"]) == 5
    serve.delete("counted")


def test_a_router_that_is_killed_gives_its_slots_back(serve_cluster: str) -> None:
    books = Books("killed", serve_cluster)
    caller = books.client()["caller"]
    thread, answers = books.hold(streams=4, hold_s=60.0)
    books.until(ongoing=4, within_s=5.0)
    os.kill(caller, signal.SIGKILL)
    books.until(ongoing=0, within_s=5.0)
    thread.join()
    assert isinstance(answers[0], httpx.HTTPError)
    serve.delete("killed")


def test_a_replica_that_is_stopped_sends_its_streams_to_the_end(serve_cluster: str) -> None:
    books = Books("drained", serve_cluster, num_replicas=2)
    thread, answers = books.hold(streams=6, hold_s=3.0)
    time.sleep(1.0)
    before = set(books.client()["replicas"])
    serve.run(application(1, SAME_LOOP, num_replicas=1), name="drained", route_prefix="/drained")
    thread.join()
    assert set(answers[0]["served"]) == before
    assert len(before) == 2
    serve.delete("drained")


def test_without_the_secret_a_replica_answers_nothing(clients: dict[str, Client]) -> None:
    handle = serve.get_deployment_handle(SLM, "loop")
    url = handle.url.remote().result(timeout_s=10)
    assert httpx.post(f"{url}/v1/x", json={}).status_code == 401
    wrong = {
        SECRET_HEADER: "guess",
        REQUEST_HEADER: ANSWER_REQUEST.encode(AnswerRequest()).decode(),
    }
    assert httpx.post(f"{url}/v1/x", json={}, headers=wrong).status_code == 401


def test_the_port_of_an_slm_is_not_behind_the_proxy(serve_cluster: str) -> None:
    assert httpx.post(f"{serve_cluster}/v1/x", json={}).status_code == 404


def test_an_adapter_is_known_to_serve_and_its_requests_follow_it(serve_cluster: str) -> None:
    client = Books("adapters", serve_cluster, num_replicas=2).client
    client.replicas(at_least=2)
    (holder,) = client({"hints": {"adapter": "sql", "decision_id": "d1"}})["served"]
    deadline_s = time.monotonic() + 5.0
    while (known := client()["adapters"])[holder] != ["sql"]:
        assert time.monotonic() < deadline_s, known
        time.sleep(0.05)
    # Of eight prompt families some prefer the other replica; the adapter decides.
    again = [client({"hints": {"adapter": "sql", "prefix_family": f"f{i}"}}) for i in range(8)]
    assert {a["served"][0] for a in again} == {holder}
    serve.delete("adapters")


def test_an_adapter_too_many_unloads_the_least_recently_used(serve_cluster: str) -> None:
    books = Books("evicting", serve_cluster)
    for name in ("sql", "text"):
        books.client({"hints": {"adapter": name, "decision_id": name}})
    assert books.read()["loaded"] == ["text"]
    serve.delete("evicting")
