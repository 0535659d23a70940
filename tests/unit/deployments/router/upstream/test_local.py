"""Replies of the fleet's own replicas: which replica is asked, and what its ways to fail mean."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any

import aiohttp
import pytest

from calm_serve.config import SLMSpec
from calm_serve.errors import CapacityError
from calm_serve.protocol.answers import ANSWER_END, ANSWER_REQUEST, AnswerEnd, AnswerRequest
from calm_serve.testing import make_facts, make_replica, make_spec
from calm_serve.types import EngineFacts
from calm_serve.upstreams import FailureKind, UpstreamError
from deployments.router.chosen import ChosenReplica
from deployments.router.live_state import LiveView
from deployments.router.upstream import local
from deployments.router.upstream.local import LocalReply
from deployments.router.upstream.slot_queue import SlotQueue
from deployments.wire import END_EVENT, AsleepReply, Hints, ReplyEnd, deployment_name
from tests.unit.deployments.router.upstream.test_slot_queue import make_queue

SMALL = deployment_name("small")
END = AnswerEnd(make_facts("r1"))
EVENT = END_EVENT + ANSWER_END.encode(END) + b"\n\n"


class Content:
    """The parts of a body; an exception among them is raised."""

    _error: asyncio.Future[Any]

    def __init__(self, parts: list[Any]) -> None:
        self._parts = list(parts)

    def set_exception(self, error: Exception) -> None:
        self._error.set_result(error)

    async def readany(self) -> bytes:
        part = self._parts.pop(0) if self._parts else b""
        if part == "silence":
            self._error = asyncio.get_running_loop().create_future()
            part = await self._error
        if isinstance(part, Exception):
            raise part
        assert isinstance(part, bytes)
        return part


class Response:
    """What a replica answers."""

    def __init__(self, *parts: Any, status: int = 200, stream: bool = False, **headers: str):
        self.status = status
        self.headers = {f"x-calm-{k.replace('_', '-')}": v for k, v in headers.items()}
        self.content_type = "text/event-stream" if stream else "application/json"
        self.content = Content(list(parts))
        self.closed = False

    async def read(self) -> bytes:
        return b"".join([part async for part in self._all()])

    async def _all(self) -> Any:
        while part := await self.content.readany():
            yield part

    def close(self) -> None:
        self.closed = True


def stream(*parts: Any) -> Response:
    return Response(*parts, stream=True, ongoing="1")


def full() -> Response:
    return Response(b"{}", status=503, no_answer="full", ongoing="4")


class Chooser:
    """Chooses the replicas in order."""

    def __init__(self, *replicas: str) -> None:
        self.replicas = replicas
        self.events: list[str] = []

    def choose(self, _hints: Hints, tried: Any = ()) -> ChosenReplica | None:
        for name in self.replicas:
            if name not in tried:
                return ChosenReplica(name, {"url": f"http://{name}", "secret": f"of {name}"})
        return None

    def sent(self, replica_id: str, _hints: Hints) -> None:
        self.events.append(f"sent {replica_id}")

    def answered(
        self, replica_id: str, _hints: Hints, *, accepted: bool, ongoing: int | None
    ) -> None:
        self.events.append(f"{replica_id} {'accepted' if accepted else 'refused'} {ongoing}")

    def finished(self, replica_id: str) -> None:
        self.events.append(f"finished {replica_id}")


class Upstream:
    """Connections to replicas that answer in turn."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.slots = make_queue()
        self.started: Awaitable[object] | None = None
        self.working: list[str] = []
        self.sent: list[tuple[str, dict[str, str]]] = []

    def queue(self, _slm: SLMSpec) -> SlotQueue:
        return self.slots

    def begun(self, replica_id: str, _reply: LocalReply) -> None:
        self.working.append(replica_id)

    def ended(self, replica_id: str, _reply: LocalReply) -> None:
        self.working.remove(replica_id)

    def start_replica(self, _slm_id: str) -> Awaitable[object] | None:
        return self.started

    async def post(self, url: str, _body: bytes, headers: Mapping[str, str]) -> Any:
        self.sent.append((url, dict(headers)))
        answer = self.answers.pop(0)
        if answer == "silence":
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> LiveView:
    view = LiveView(lambda: 0.0)
    view.update_replicas(SMALL, [make_replica("r1"), make_replica("r2")])
    monkeypatch.setattr(local, "VIEW", view)
    return view


@pytest.fixture
def chooser(view: LiveView) -> Chooser:
    chooser = Chooser("r1", "r2")
    view.attach_chooser(SMALL, chooser)
    return chooser


def reply(upstream: Upstream, spec: SLMSpec | None = None, **hints: Any) -> LocalReply:
    slm = spec or make_spec("small")
    given: Any = {"decision_id": "d", **hints}
    return LocalReply(upstream, slm, "/v1/x", b"{}", AnswerRequest("d"), given)  # type: ignore[arg-type]


async def failure_of(one: LocalReply) -> FailureKind:
    with pytest.raises(UpstreamError) as caught:
        [item async for item in one]
    return caught.value.failure.kind


async def test_a_stream_passes_and_ends_with_the_facts(view: LiveView, chooser: Chooser) -> None:
    upstream = Upstream(stream(b"data: 1\n\n", b"data: 2\n\n" + EVENT))
    items = [item async for item in reply(upstream)]
    assert items == [b"data: 1\n\n", b"data: 2\n\n", ReplyEnd(b"", END.facts)]
    assert chooser.events == ["sent r1", "r1 accepted 1", "finished r1"]
    ((url, headers),) = upstream.sent
    assert (url, headers["x-calm-secret"]) == ("http://r1/v1/x", "of r1")
    assert ANSWER_REQUEST.decode(headers["x-calm-request"]) == AnswerRequest("d")
    assert view.take_routed("d") == "r1"


async def test_a_document_comes_with_its_facts(chooser: Chooser) -> None:
    whole = Response(b"{}", end=ANSWER_END.encode(END).decode())
    assert [item async for item in reply(Upstream(whole))] == [ReplyEnd(b"{}", END.facts)]


async def test_a_full_replica_is_replaced_by_the_next_one(view: LiveView, chooser: Chooser) -> None:
    upstream = Upstream(full(), stream(EVENT))
    assert len([item async for item in reply(upstream)]) == 1
    assert [url for url, _ in upstream.sent] == ["http://r1/v1/x", "http://r2/v1/x"]
    assert chooser.events[:4] == ["sent r1", "r1 refused 4", "finished r1", "sent r2"]
    assert view.take_routed("d") == "r1"  # the one that was preferred


async def test_when_all_are_full_the_request_waits_for_a_slot(chooser: Chooser) -> None:
    upstream = Upstream(full(), full(), stream(EVENT))
    assert len([item async for item in reply(upstream)]) == 1
    assert len(upstream.sent) == 3


async def test_a_request_that_would_wait_too_long_is_a_capacity_error(chooser: Chooser) -> None:
    upstream = Upstream(full(), full())
    with pytest.raises(CapacityError) as caught:
        [item async for item in reply(upstream, wait_limit_s=0.0)]
    assert caught.value.retry_after_s > 0
    assert len(upstream.sent) == 2
    assert len(upstream.slots) == 0


async def test_a_request_holds_its_slot_until_its_end(chooser: Chooser) -> None:
    upstream = Upstream(full(), stream(b"data: 1\n\n", EVENT))
    one = reply(upstream)
    await anext(one)
    assert upstream.slots.held == 1
    assert [item async for item in one] == [ReplyEnd(b"", END.facts)]
    assert upstream.slots.held == 0


@pytest.mark.parametrize(
    ("deaths", "ongoing", "kind"),
    [
        (0, 1, FailureKind.ENGINE_DIED),
        (1, 1, FailureKind.POISON),
        (1, 3, FailureKind.POISON),
    ],
)
async def test_a_second_death_with_one_request_is_the_last_one(
    chooser: Chooser, deaths: int, ongoing: int, kind: FailureKind
) -> None:
    one = reply(Upstream(_dead("dead", ongoing)), engine_deaths=deaths)
    assert await failure_of(one) is kind


def _dead(why: str, ongoing: int) -> Response:
    return Response(b"{}", status=500, no_answer=why, ongoing=str(ongoing))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Response(b'{"error": {"message": "bad"}}', status=400), FailureKind.INVALID_REQUEST),
        (Response(b'{"error": {"message": "no memory"}}', status=500), FailureKind.SERVER_ERROR),
        (_dead("dead", 1), FailureKind.ENGINE_DIED),
        (_dead("dead", 3), FailureKind.ENGINE_DIED),
        (_dead("gone", 1), FailureKind.ENGINE_DIED),
        (stream(b"data: 1\n\n"), FailureKind.TRANSPORT),
        (stream(b"data: 1\n\n", aiohttp.ClientPayloadError("cut")), FailureKind.TRANSPORT),
        (aiohttp.ServerDisconnectedError(), FailureKind.TRANSPORT),
    ],
    ids=[
        "the engine refuses it",
        "the engine fails",
        "the engine died with it alone",
        "the engine died with others in it",
        "the engine was dead before",
        "it breaks off",
        "its connection breaks",
        "the replica is gone",
    ],
)
async def test_every_way_to_fail_has_its_kind(
    chooser: Chooser, answer: Any, kind: FailureKind
) -> None:
    assert await failure_of(reply(Upstream(answer))) is kind
    assert chooser.events[-1] == "finished r1"


@pytest.mark.parametrize("dead", [False, True])
async def test_an_engine_that_fails_in_the_middle_of_a_stream_is_a_failure(
    view: LiveView, chooser: Chooser, dead: bool
) -> None:
    end = AnswerEnd(EngineFacts(), ongoing=2, failure="failed", engine_dead=dead)
    event = END_EVENT + ANSWER_END.encode(end) + b"\n\n"
    kind = await failure_of(reply(Upstream(stream(b"data: 1\n\n", event))))
    assert kind is (FailureKind.ENGINE_DIED if dead else FailureKind.SERVER_ERROR)
    assert [r.replica_id for r in view.replicas(SMALL)] == (["r2"] if dead else ["r1", "r2"])


async def test_a_closed_port_means_that_the_replica_is_gone(
    view: LiveView, chooser: Chooser
) -> None:
    key: Any = aiohttp.client_reqrep.ConnectionKey("r1", 80, False, True, None, None, None)
    closed = aiohttp.ClientConnectorError(key, ConnectionRefusedError())
    assert await failure_of(reply(Upstream(closed))) is FailureKind.TRANSPORT
    assert [r.replica_id for r in view.replicas(SMALL)] == ["r2"]


async def test_an_slm_that_sleeps_says_so(chooser: Chooser) -> None:
    (item,) = [i async for i in reply(Upstream(Response(b"{}", status=503, no_answer="asleep")))]
    assert isinstance(item, AsleepReply)


async def test_an_slm_without_a_replica_fails_at_once(view: LiveView) -> None:
    assert await failure_of(reply(Upstream())) is FailureKind.TRANSPORT


async def test_a_replica_of_an_slm_that_may_go_cold_is_waited_for(view: LiveView) -> None:
    upstream = Upstream(stream(EVENT))

    async def start() -> None:
        view.attach_chooser(SMALL, Chooser("r9"))

    upstream.started = start()
    assert len([item async for item in reply(upstream)]) == 1
    assert upstream.sent[0][0] == "http://r9/v1/x"


async def test_a_replica_that_does_not_begin_in_time_has_failed(chooser: Chooser) -> None:
    one = reply(Upstream("silence"), first_byte_limit_s=0.01)
    assert await failure_of(one) is FailureKind.TIMED_OUT
    assert chooser.events == ["sent r1", "finished r1"]


async def test_a_client_that_leaves_closes_the_connection(chooser: Chooser) -> None:
    response = stream(b"data: 1\n\n", b"data: 2\n\n")
    one = reply(Upstream(response))
    assert await anext(one) == b"data: 1\n\n"
    one.cancel()
    assert response.closed
    assert chooser.events[-1] == "finished r1"


async def test_a_reply_that_is_dropped_gives_its_slot_back(chooser: Chooser) -> None:
    response = stream(b"data: 1\n\n", b"data: 2\n\n")
    one = reply(Upstream(response))
    await anext(one)
    del one
    assert response.closed
    assert chooser.events[-1] == "finished r1"


@pytest.mark.parametrize(
    ("others", "deaths", "kind"),
    [(0, 0, FailureKind.ENGINE_DIED), (0, 1, FailureKind.POISON), (4, 0, FailureKind.ENGINE_DIED)],
)
async def test_a_document_of_a_replica_that_hangs_fails_when_the_replica_is_known_to(
    view: LiveView, chooser: Chooser, others: int, deaths: int, kind: FailureKind
) -> None:
    upstream = Upstream("silence")
    one = reply(upstream, engine_deaths=deaths)
    waiting = asyncio.create_task(failure_of(one))
    for _ in range(3):
        await asyncio.sleep(0)
    assert upstream.working == ["r1"]
    one.break_off(others)
    assert await waiting is kind
    assert upstream.working == []
    assert [r.replica_id for r in view.replicas(SMALL)] == ["r2"]


async def test_a_stream_of_a_replica_that_hangs_fails_when_the_replica_is_known_to(
    chooser: Chooser,
) -> None:
    response = stream(b"data: 1\n\n", "silence")
    one = reply(Upstream(response))
    assert await anext(one) == b"data: 1\n\n"
    waiting = asyncio.create_task(failure_of(one))
    await asyncio.sleep(0)
    one.break_off(others=0)
    assert await waiting is FailureKind.ENGINE_DIED
    assert response.closed
