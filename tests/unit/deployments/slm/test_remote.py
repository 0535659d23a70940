"""A remote SLM against a scripted upstream: bytes pass through, failures become refusals."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.testing import make_spec
from deployments.slm import remote
from deployments.slm.remote import RemoteSLM, usage_of
from deployments.wire import ErrorReply, ReplyEnd

SPEC = make_spec(
    "cloud",
    model="gpt-tiny",
    locality="remote",
    remote={"base_url": "http://upstream/v1/", "api_key_env": "UPSTREAM_KEY"},
    priors={"energy_j_per_token": 0.5},
)
ANSWER = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 8}}
Handler = Callable[[httpx.Request], Any]


class Chunks(httpx.AsyncByteStream):
    """A response body in chunks; an exception among them breaks the connection."""

    def __init__(self, *chunks: Any) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


class Reports:
    """Stands in for the reporter to the knowledge actor."""

    seen: list[str] = []

    def __init__(self, *_args: Any) -> None:
        self.seen.clear()

    def report(self, state: str, *_args: Any) -> None:
        self.seen.append(state)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"), app_name="own")
    monkeypatch.setattr(remote.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(remote, "StateReporter", Reports)
    monkeypatch.setenv("UPSTREAM_KEY", "secret")

    async def start(handler: Handler, spec: Any = SPEC) -> Any:
        slm: Any = RemoteSLM.__new__(RemoteSLM)
        await slm.__init__(spec, "calm", transport=httpx.MockTransport(handler))
        return slm

    return start


async def answers(slm: Any, body: dict[str, Any] | None = None, method: str = "chat") -> list[Any]:
    return [item async for item in getattr(slm, method)(body or {"messages": []}, {})]


async def test_an_answer_passes_through_and_its_usage_is_counted(start: Any) -> None:
    slm = await start(lambda _: httpx.Response(200, json=ANSWER))
    items = await answers(slm)
    assert isinstance(items[-1], ReplyEnd)
    assert json.loads(b"".join([*items[:-1], items[-1].payload])) == ANSWER
    facts = items[-1].facts
    assert (facts.replica_id, facts.prompt_tokens, facts.output_tokens) == ("r1", 12, 8)
    assert facts.energy_j == pytest.approx(4.0)


async def test_a_stream_keeps_its_bytes_in_order_and_ends_with_one_reply_end(start: Any) -> None:
    chunks = [b"data: 1\n\n", b"data: " + json.dumps(ANSWER).encode(), b"\n\ndata: [DONE]\n\n"]
    slm = await start(lambda _: httpx.Response(200, stream=Chunks(*chunks)))
    items = await answers(slm, {"stream": True})
    assert b"".join([*items[:-1], items[-1].payload]) == b"".join(chunks)
    assert [type(i) for i in items] == [bytes, bytes, ReplyEnd]
    assert items[-1].facts.output_tokens == 8


@pytest.mark.parametrize(
    ("method", "path"), [("chat", "/v1/chat/completions"), ("complete", "/v1/completions")]
)
async def test_the_upstream_gets_its_own_model_name_key_and_path(
    start: Any, method: str, path: str
) -> None:
    seen: list[httpx.Request] = []

    def upstream(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=ANSWER)

    body = {"model": "cloud", "temperature": 0}
    await answers(await start(upstream), body, method)
    (request,) = seen
    assert request.url == f"http://upstream{path}"
    assert json.loads(request.content) == {"model": "gpt-tiny", "temperature": 0}
    assert request.headers["authorization"] == "Bearer secret"
    assert body["model"] == "cloud"


@pytest.mark.parametrize("status", [400, 404, 429, 500])
async def test_an_upstream_error_is_an_error_reply_with_its_body(start: Any, status: int) -> None:
    slm = await start(lambda _: httpx.Response(status, json={"error": {"message": "no"}}))
    (reply,) = await answers(slm)
    assert isinstance(reply, ErrorReply)
    assert (reply.http_status, json.loads(reply.body)["error"]["message"]) == (status, "no")


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_the_upstream_refuses_is_not_the_clients_fault(
    start: Any, status: int
) -> None:
    (reply,) = await answers(await start(lambda _: httpx.Response(status)))
    assert reply.http_status == 502
    assert f"refused our key ({status})" in json.loads(reply.body)["error"]["message"]


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError("x"), httpx.ReadTimeout("x"), httpx.RemoteProtocolError("x")]
)
async def test_an_upstream_that_does_not_answer_is_a_bad_gateway(
    start: Any, failure: Exception
) -> None:
    def upstream(_request: httpx.Request) -> httpx.Response:
        raise failure

    (reply,) = await answers(await start(upstream))
    assert reply.http_status == 502
    message = json.loads(reply.body)["error"]["message"]
    assert "'cloud'" in message
    assert type(failure).__name__ in message


async def test_a_connection_that_breaks_after_the_first_bytes_raises(start: Any) -> None:
    broken = Chunks(b"one", b"two", httpx.ReadError("gone"))
    slm = await start(lambda _: httpx.Response(200, stream=broken))
    got: list[Any] = []
    with pytest.raises(httpx.ReadError):
        async for item in slm.chat({"stream": True}):
            got.append(item)
    assert got == [b"one", b"two"]


async def test_a_document_that_breaks_off_is_a_bad_gateway(start: Any) -> None:
    broken = Chunks(b"one", httpx.ReadError("gone"))
    (reply,) = await answers(await start(lambda _: httpx.Response(200, stream=broken)))
    assert reply.http_status == 502


async def test_requests_inside_are_counted_until_they_end_however_they_end(start: Any) -> None:
    slm = await start(lambda _: httpx.Response(200, stream=Chunks(b"one", b"two", b"three")))
    stream = slm.chat({"stream": True})
    await anext(stream)
    assert slm.record_routing_stats()["running"] == 1
    await stream.aclose()
    assert slm.record_routing_stats()["running"] == 0
    await answers(await start(lambda _: httpx.Response(500)))
    assert slm.record_routing_stats()["running"] == 0


async def test_starting_reports_readiness_and_needs_no_key(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UPSTREAM_KEY")
    seen: list[httpx.Request] = []

    def upstream(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=ANSWER)

    slm = await start(upstream)
    assert Reports.seen == ["ready"]
    await answers(slm)
    assert "authorization" not in seen[0].headers


async def test_a_local_slm_cannot_be_started_as_a_remote_one(start: Any) -> None:
    with pytest.raises(ValueError, match="'small' is not remote"):
        await start(lambda _: httpx.Response(200), make_spec("small"))


@pytest.mark.parametrize(
    ("tail", "usage"),
    [
        (json.dumps(ANSWER).encode(), (12, 8)),
        (b'data: {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\ndata: [DONE]', (3, 4)),
        (b'{"usage": {"prompt_tokens": 1}} {"usage": {"completion_tokens": 2}}', (0, 2)),
        (b'{"usage": null}', (0, 0)),
        (b'{"usage": {"prompt_tokens": "many", "completion_tokens": -5}}', (0, 0)),
        (b'{"usage": {"prompt_tok', (0, 0)),
        (b'{"usage": {"prompt_tokens": true, "completion_tokens": %d}}' % 2**63, (0, 0)),
        (b'{"usage": {"prompt_tokens": 1' + b"0" * 5000 + b"}}", (0, 0)),
        (b'"usage"' + b'{"a":' * 1600, (0, 0)),
        (b"", (0, 0)),
    ],
)
def test_usage_is_read_from_the_end_of_an_answer(tail: bytes, usage: tuple[int, int]) -> None:
    assert usage_of(tail) == usage


@given(st.binary(), st.recursive(st.none() | st.floats() | st.text(), st.lists))
def test_no_tail_breaks_the_count(noise: bytes, value: Any) -> None:
    tail = noise + b'"usage": ' + json.dumps({"prompt_tokens": value}).encode() + noise
    assert all(n >= 0 for n in usage_of(tail))
