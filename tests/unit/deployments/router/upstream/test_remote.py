"""Remote SLMs: what a provider may do, and what client and router get of it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from calm_serve.config import SLMSpec
from calm_serve.errors import CapacityError
from calm_serve.types import Cost
from calm_serve.upstreams import FailureKind, UpstreamError
from deployments.router.live_state import LiveView
from deployments.router.upstream import remote
from deployments.router.upstream.remote import EmptyAnswerError, RemoteReply
from deployments.router.upstream.slot_queue import SlotQueue
from deployments.wire import ReplyEnd, deployment_name
from tests.unit.deployments.router.upstream.test_slot_queue import make_queue

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**ASK, "stream": True}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USED = b'data: {"choices":[],"usage":' + json.dumps(USAGE).encode() + b"}\n\n"
DONE = b"data: [DONE]\n\n"
HELLO = {
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    ],
    "usage": USAGE,
}


class Content:
    """The body of a response: parts, an exception, or silence."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = list(parts)

    async def readany(self) -> bytes:
        if not self._parts:
            return b""
        part = self._parts.pop(0)
        if part == "silence":
            await asyncio.Event().wait()
        if isinstance(part, Exception):
            raise part
        assert isinstance(part, bytes)
        return part


class Response:
    """What a provider answers."""

    def __init__(self, *parts: Any, status: int = 200, **headers: str) -> None:
        self.status = status
        self.headers = {k.replace("_", "-"): v for k, v in headers.items()}
        self.content = Content(list(parts))
        self.closed = False

    def close(self) -> None:
        self.closed = True


def events(*parts: Any) -> Response:
    return Response(*parts, content_type="text/event-stream")


def document(body: Any, status: int = 200, **headers: str) -> Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Response(raw, status=status, content_type="application/json", **headers)


class Upstream:
    """Connections that answer every request with `answer`."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.running: Counter[str] = Counter()
        self.slots = make_queue()
        self.sent: dict[str, Any] = {}

    def queue(self, _slm: SLMSpec) -> SlotQueue:
        return self.slots

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], connect_timeout_s: float
    ) -> Any:
        self.sent = {
            "url": url,
            "body": json.loads(body),
            "headers": dict(headers),
            "connect_timeout_s": connect_timeout_s,
        }
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Chooser:
    """Knows the key."""

    def choose(self, _hints: Any, _tried: Any = ()) -> Any:
        from deployments.router.chosen import ChosenReplica

        return ChosenReplica("r1", {"url": "https://provider/v1", "secret": "sk-secret"})


@pytest.fixture(autouse=True)
def _view(monkeypatch: pytest.MonkeyPatch) -> None:
    view = LiveView(lambda: 0.0)
    view.attach_chooser(deployment_name("cloud"), Chooser())  # type: ignore[arg-type]
    monkeypatch.setattr(remote, "VIEW", view)


def spec(**fields: Any) -> SLMSpec:
    return SLMSpec.model_validate(
        {
            "id": "cloud",
            "model": "gpt-x",
            "locality": "remote",
            "remote": {"base_url": "https://provider/v1", **fields},
        }
    )


def reply(upstream: Upstream, body: Any = STREAM, path: str = CHAT, **fields: Any) -> RemoteReply:
    slm = spec(**fields)
    assert slm.remote is not None
    return RemoteReply(upstream, slm, slm.remote, path, body)  # type: ignore[arg-type]


async def read(one: RemoteReply) -> tuple[bytes, ReplyEnd]:
    items = [item async for item in one]
    assert isinstance(items[-1], ReplyEnd)
    return b"".join(items[:-1]) + items[-1].payload, items[-1]


async def kind_of(one: RemoteReply) -> FailureKind:
    with pytest.raises(UpstreamError) as caught:
        await read(one)
    return caught.value.failure.kind


async def test_a_stream_passes_and_its_usage_is_counted_and_hidden() -> None:
    upstream = Upstream(events(ROLE, WORD, LAST, USED, DONE))
    content, end = await read(reply(upstream))
    assert content == ROLE + WORD + LAST + DONE
    assert (end.facts.prompt_tokens, end.facts.output_tokens) == (7, 3)
    assert end.facts.energy_j == pytest.approx(0.3)
    assert upstream.sent["body"]["stream_options"] == {"include_usage": True}
    assert upstream.running["cloud"] == 0


async def test_a_client_that_asked_for_usage_gets_it() -> None:
    body = {**STREAM, "stream_options": {"include_usage": True}}
    content, _ = await read(reply(Upstream(events(WORD, LAST, USED, DONE)), body))
    assert content == WORD + LAST + USED + DONE


async def test_the_upstream_gets_its_own_model_key_and_path() -> None:
    upstream = Upstream(document(HELLO))
    content, end = await read(reply(upstream, ASK, connect_timeout_s=2.0))
    assert json.loads(content) == HELLO
    assert end.facts.output_tokens == 3
    assert upstream.sent["url"] == "https://provider/v1/chat/completions"
    assert upstream.sent["body"]["model"] == "gpt-x"
    assert upstream.sent["headers"]["authorization"] == "Bearer sk-secret"
    assert upstream.sent["connect_timeout_s"] == 2.0


async def test_nothing_is_given_before_the_first_content() -> None:
    one = reply(Upstream(events(b": ping\n\n", ROLE, WORD, LAST, DONE)))
    assert await anext(one) == b": ping\n\n" + ROLE + WORD


ERROR = b'data: {"error":{"message":"overloaded","type":"server_error"}}\n\n'


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (document({"error": {"message": "slow down"}}, 429), FailureKind.RATE_LIMITED),
        (document({"error": {"message": "bad key"}}, 401), FailureKind.MISCONFIGURED),
        (document({"error": {"message": "no model"}}, 404), FailureKind.MISCONFIGURED),
        (Response(b"<html>", status=502, content_type="text/html"), FailureKind.SERVER_ERROR),
        (Response(b"", status=302, location="https://other"), FailureKind.MISCONFIGURED),
        (Response(b"<html>", content_type="text/html"), FailureKind.BAD_ANSWER),
        (events(ERROR, DONE), None),
        (events(ROLE, DONE), FailureKind.EMPTY_ANSWER),
        (events(ROLE), FailureKind.BAD_ANSWER),
        (events(), FailureKind.BAD_ANSWER),
        (events(WORD, ERROR), None),
        (events(WORD), FailureKind.BAD_ANSWER),
        (aiohttp.ClientConnectionError("no route"), FailureKind.TRANSPORT),
        (events(WORD, aiohttp.ClientPayloadError("cut")), FailureKind.TRANSPORT),
    ],
    ids=[
        "rate limited",
        "refused our key",
        "does not know the model",
        "its proxy failed",
        "redirects",
        "answers with a page",
        "an error event at once",
        "no content",
        "no content and no end",
        "nothing",
        "an error event after content",
        "no end",
        "no connection",
        "the connection breaks",
    ],
)
async def test_what_is_no_answer_is_a_failure(answer: Any, kind: FailureKind | None) -> None:
    found = await kind_of(reply(Upstream(answer)))
    assert kind is None or found is kind


@pytest.mark.parametrize(
    "timeouts", [{"first_byte_timeout_s": 0.01}, {"timeout_s": 0.01}], ids=["first", "whole"]
)
async def test_an_upstream_that_says_nothing_times_out(timeouts: dict[str, float]) -> None:
    one = reply(Upstream(events("silence")), **timeouts)
    assert await kind_of(one) is FailureKind.TIMED_OUT


@pytest.mark.parametrize("body", [STREAM, ASK], ids=["stream", "document"])
async def test_an_answer_that_takes_longer_than_the_operator_allows_is_not_the_upstreams_failure(
    body: Any,
) -> None:
    parts = [WORD] if body is STREAM else [b" "]
    answer = events(*parts, "silence")
    if body is ASK:
        answer.headers["content-type"] = "application/json"
    assert await kind_of(reply(Upstream(answer), body, timeout_s=0.01)) is FailureKind.OUT_OF_TIME


async def test_an_upstream_that_falls_silent_times_out() -> None:
    response = events(WORD, "silence")
    one = reply(Upstream(response), idle_timeout_s=0.01)
    assert await anext(one) == WORD
    assert await kind_of(one) is FailureKind.TIMED_OUT
    assert response.closed


async def test_an_empty_document_is_kept_in_case_no_other_slm_answers() -> None:
    empty = {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}], "usage": USAGE}
    with pytest.raises(EmptyAnswerError) as caught:
        await read(reply(Upstream(document(empty)), ASK))
    assert json.loads(caught.value.answer.payload) == empty


async def test_a_route_that_the_upstream_lacks_is_unsupported() -> None:
    one = reply(Upstream(document(HELLO)), ASK, path="/tokenize")
    assert await kind_of(one) is FailureKind.UNSUPPORTED


async def test_beyond_its_limit_the_upstream_is_full() -> None:
    upstream = Upstream(events("silence"))
    first = asyncio.create_task(anext(reply(upstream, max_concurrent_requests=1)))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(CapacityError):
        await read(reply(upstream, max_concurrent_requests=1))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert upstream.running["cloud"] == 0


async def test_a_client_that_leaves_closes_the_connection() -> None:
    response = events(WORD, "silence")
    one = reply(Upstream(response))
    await anext(one)
    one.cancel()
    assert response.closed
    with pytest.raises(StopAsyncIteration):
        await anext(one)


async def test_anthropics_stream_becomes_a_chat() -> None:
    parts = [
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","model":"c",'
        b'"role":"assistant","content":[],"usage":{"input_tokens":7,"output_tokens":1}}}\n\n',
        b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        b'"content_block":{"type":"text","text":""}}\n\n',
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"hello"}}\n\n',
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n',
        b'event: message_delta\ndata: {"type":"message_delta","delta":'
        b'{"stop_reason":"end_turn"},"usage":{"output_tokens":3}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ]
    body = {**STREAM, "max_tokens": 9}
    upstream = Upstream(events(*parts))
    content, end = await read(reply(upstream, body, dialect="anthropic"))
    assert b'"content":"hello"' in content.replace(b": ", b":")
    assert content.endswith(DONE)
    assert (end.facts.prompt_tokens, end.facts.output_tokens) == (7, 3)
    assert upstream.sent["url"].endswith("/messages")


PRICES = {
    "currency": "EUR",
    "input_per_million_tokens": 1e6,
    "output_per_million_tokens": 1e6,
}
# 7 tokens of the prompt and 3 of the answer, one unit of money each.
TEN = Cost(10.0, "EUR")


@pytest.mark.parametrize(
    ("answer", "body"), [(events(WORD, LAST, USED, DONE), STREAM), (document(HELLO), ASK)]
)
async def test_an_answer_costs_what_its_usage_says(answer: Any, body: Any) -> None:
    one = reply(Upstream(answer), body, prices=PRICES)
    assert one.cost is None
    await read(one)
    assert one.cost == TEN


async def test_without_prices_or_usage_no_cost_is_known() -> None:
    free = reply(Upstream(events(WORD, LAST, USED, DONE)))
    silent = reply(Upstream(events(WORD, LAST, DONE)), prices=PRICES)
    for one in (free, silent):
        await read(one)
        assert one.cost is None


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (events(WORD, USED, aiohttp.ClientPayloadError("cut")), STREAM),
        (events(USED, ERROR), STREAM),
        (document({**HELLO, "choices": []}), ASK),
    ],
    ids=["broke off", "an error event", "empty"],
)
async def test_a_failed_attempt_costs_what_was_charged_for_it(answer: Any, body: Any) -> None:
    one = reply(Upstream(answer), body, prices=PRICES)
    with pytest.raises(UpstreamError):
        await read(one)
    assert one.cost == TEN


async def test_a_router_sends_an_upstream_as_many_requests_as_are_configured() -> None:
    limit = 3
    upstream = Upstream(events(*["silence"] * limit))
    running = [
        asyncio.create_task(anext(reply(upstream, max_concurrent_requests=limit)))  # type: ignore[arg-type]
        for _ in range(limit)
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert upstream.running["cloud"] == limit
    with pytest.raises(CapacityError, match="concurrent requests") as caught:
        await read(reply(upstream, max_concurrent_requests=limit))
    assert caught.value.retry_after_s > 0
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert upstream.slots.held == 0
