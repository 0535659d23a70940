"""How an SLM replica answers a router: who may ask, what passes, and what the router is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from calm_serve.errors import ComponentError
from calm_serve.protocol.answers import ANSWER_END, ANSWER_REQUEST, AnswerEnd, AnswerRequest
from calm_serve.testing import FakeClock, make_spec
from calm_serve.types import PromptEnd
from deployments.slm.answer import RECENT_PROMPTS, Answerer
from deployments.slm.deployment import SLM
from deployments.slm.serve_account import FullError
from deployments.slm.sleep import ReplicaResidency
from deployments.slm.stall import STALL_S, StallDetector
from deployments.wire import END_EVENT

CHAT = "/v1/chat/completions"
BODY = b'{"model": "small", "messages": []}'
ROLE, WORD = b'data: {"role"}\n\n', b'data: {"word"}\n\n'
DONE = b"data: [DONE]\n\n"
BROKEN = b'data: {"error": {"message": "EngineCore died"}}\n\n'
App = Callable[[Any, Any, Any], Awaitable[None]]


class EngineDead(Exception):
    """vLLM's EngineDeadError."""


@dataclass
class Facts:
    """What the engine recorded of one request."""

    on_tokens: Callable[[int], None]
    keep_text: bool = False
    prompt_tokens: int = 3
    cached_tokens: int = 2
    output_tokens: int = 0
    queue_s: float = 0.1
    ttft_s: float = 0.2
    text: list[str] = field(default_factory=list)

    def produce(self, text: str, tokens: int) -> None:
        self.output_tokens += tokens
        self.text.append(text)
        self.on_tokens(tokens)


class Engine:
    """An engine whose HTTP application is `app`."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.dead = False
        self.facts: Any = None
        self.load = SimpleNamespace(steps=0, running=2, waiting=1, kv_usage_ratio=0.5)

    @contextlib.contextmanager
    def observed(self, facts: Facts) -> Iterator[None]:
        self.facts = facts
        yield

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDead("killed")

    async def sleep(self) -> None:
        """Not used here."""

    async def wake(self) -> None:
        """Not used here."""

    def shutdown(self) -> None:
        """Nothing to stop."""


class Account:
    """Serve's books with a number of slots."""

    def __init__(self, slots: int = 4) -> None:
        self.slots, self.ongoing = slots, 0
        self.statuses: list[str] = []

    @contextlib.asynccontextmanager
    async def request(self, **_about: Any) -> AsyncIterator[Callable[[str], None]]:
        if self.ongoing >= self.slots:
            raise FullError
        self.ongoing += 1
        try:
            yield self.statuses.append
        finally:
            self.ongoing -= 1


class Energy:
    """An energy account of one joule a token."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}

    def start(self, key: str) -> None:
        self.running[key] = 0

    def add_tokens(self, key: str, tokens: int) -> None:
        self.running[key] += tokens

    def finish(self, key: str) -> Any:
        return SimpleNamespace(energy_j=float(self.running.pop(key)), source="estimate")


class Replica:
    """An answering replica without Ray and vLLM."""

    def __init__(self, app: App, slots: int = 4, **spec: Any) -> None:
        self.engine, self.account, self.energy = Engine(app), Account(slots), Energy()
        self.clock = FakeClock()
        self.reports: list[tuple[str, str]] = []
        self.loaded: list[str] = []
        residency = ReplicaResidency(self.engine, self._report)
        self.slm: Any = SLM.__new__(SLM)
        self.slm.__dict__ |= {
            "_engine": self.engine,
            "_residency": residency,
            "_dead_error": EngineDead,
            "_stall": StallDetector(self.clock),
        }
        self.answerer = Answerer(
            make_spec("small", **spec),
            "r1",
            "open sesame",
            self.engine,
            facts=Facts,
            account=self.account,  # type: ignore[arg-type]
            residency=residency,
            energy=self.energy,
            load_adapter=self._load,
            check_engine=self.slm._check_engine,
        )
        self.slm._answerer = self.answerer

    def _report(self, state: str, _times: Mapping[str, float], detail: str) -> None:
        self.reports.append((state, detail))

    async def _load(self, name: str) -> Any:
        self.loaded.append(name)
        return SimpleNamespace(in_use=contextlib.nullcontext)

    async def ask(
        self,
        asked: AnswerRequest = AnswerRequest("d"),  # noqa: B008  # frozen
        path: str = CHAT,
        secret: str = "open sesame",
        method: str = "POST",
        body: bytes = BODY,
    ) -> Response:
        """Send a request as a router does."""
        messages: list[dict[str, Any]] = [{"type": "http.request", "body": body}]
        response = Response()

        async def receive() -> dict[str, Any]:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop(0)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [
                (b"content-type", b"application/json"),
                (b"x-calm-secret", secret.encode()),
                (b"x-calm-request", ANSWER_REQUEST.encode(asked)),
            ],
        }
        await self.answerer(scope, receive, response.take)
        return response


class Response:
    """What the router receives."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []

    async def take(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.parts.append(message["body"])

    @property
    def content(self) -> bytes:
        return b"".join(self.parts)

    @property
    def end(self) -> AnswerEnd:
        if "x-calm-end" in self.headers:
            return ANSWER_END.decode(self.headers["x-calm-end"])
        event = self.parts[-1]
        assert event.startswith(END_EVENT) and event.endswith(b"\n\n")
        return ANSWER_END.decode(event[len(END_EVENT) :])


def streaming(*parts: bytes, replica: list[Replica] | None = None) -> App:
    """An application that streams; a word is one token."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            if replica and part == WORD:
                replica[0].engine.facts.produce("word", 1)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def document(status: int, body: Any, replica: list[Replica] | None = None, text: str = "") -> App:
    """An application that answers with one document."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if replica:
            replica[0].engine.facts.produce(text, 7)
        raw = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": raw})

    return app


async def test_a_stream_passes_unchanged_and_ends_with_the_facts() -> None:
    replicas: list[Replica] = []
    replicas.append(Replica(streaming(ROLE, WORD, WORD, DONE, replica=replicas)))
    response = await replicas[0].ask()
    assert response.status == 200
    assert b"".join(response.parts[:-1]) == ROLE + WORD + WORD + DONE
    facts = response.end.facts
    assert (facts.replica_id, facts.output_tokens, facts.energy_j) == ("r1", 2, 2.0)
    assert (facts.prompt_tokens, facts.cached_tokens, facts.running) == (3, 2, 2)
    assert replicas[0].energy.running == {}
    assert replicas[0].account.statuses == ["200"]


async def test_the_role_of_a_chat_goes_out_with_the_first_word() -> None:
    response = await Replica(streaming(ROLE, WORD, DONE)).ask()
    assert response.parts[0] == ROLE + WORD


async def test_the_first_token_of_a_completion_does_not_wait_for_the_second() -> None:
    response = await Replica(streaming(WORD, WORD, DONE)).ask(path="/v1/completions")
    assert response.parts[0] == WORD


async def test_a_document_comes_with_its_facts_in_a_header() -> None:
    replicas: list[Replica] = []
    replicas.append(Replica(document(200, {"id": 1}, replicas)))
    response = await replicas[0].ask()
    assert (response.status, response.content) == (200, b'{"id": 1}')
    assert response.end.facts.output_tokens == 7
    assert response.end.ongoing == 0


async def test_an_error_document_of_the_engine_passes_as_it_is() -> None:
    replica = Replica(document(400, {"error": {"message": "too long"}}))
    response = await replica.ask()
    assert (response.status, response.content) == (400, b'{"error": {"message": "too long"}}')
    assert "x-calm-no-answer" not in response.headers
    assert replica.account.statuses == ["400"]


@pytest.mark.parametrize("secret", ["", "open", "open sesame "])
async def test_without_the_secret_nothing_is_answered(secret: str) -> None:
    replica = Replica(document(200, {}))
    assert (await replica.ask(secret=secret)).status == 401
    assert replica.engine.facts is None
    assert replica.account.statuses == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/sleep"),
        ("POST", "/collective_rpc"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/v1/chat/completions/"),
        ("GET", CHAT),
        ("GET", "/metrics"),
    ],
)
async def test_routes_that_are_not_for_answers_are_not_there(method: str, path: str) -> None:
    replica = Replica(document(200, {}))
    assert (await replica.ask(method=method, path=path)).status == 404
    assert replica.engine.facts is None


async def test_a_full_replica_says_so_and_how_many_requests_it_has() -> None:
    replica = Replica(document(200, {}), slots=0)
    response = await replica.ask()
    assert (response.status, response.headers["x-calm-no-answer"]) == (503, "full")
    assert response.headers["x-calm-ongoing"] == "0"


async def test_an_adapter_is_loaded_before_the_engine_sees_the_request() -> None:
    replica = Replica(document(200, {}))
    await replica.ask(AnswerRequest("d", adapter="sql"))
    assert replica.loaded == ["sql"]


async def test_a_dead_engine_is_named_in_the_reply_and_reported_once() -> None:
    replica = Replica(document(500, {"error": {"message": "EngineCore died"}}))
    replica.engine.dead = True
    found = [await replica.ask() for _ in range(2)]  # the second one does not reach the engine
    assert [(r.status, r.headers["x-calm-no-answer"]) for r in found] == [
        (500, "dead"),
        (503, "gone"),
    ]
    assert replica.reports == [("failed", "died: killed")]
    with pytest.raises(ComponentError):
        await replica.slm.check_health()


async def test_an_error_of_a_live_engine_reports_no_death() -> None:
    replica = Replica(document(500, {"error": {"message": "no memory"}}))
    response = await replica.ask()
    assert response.status == 500
    assert json.loads(response.content)["error"]["message"] == "no memory"
    assert "x-calm-no-answer" not in response.headers
    assert replica.reports == []
    await replica.slm.check_health()


async def test_an_error_before_the_first_word_is_a_status_not_a_stream() -> None:
    response = await Replica(streaming(ROLE, BROKEN, DONE)).ask()
    assert response.status == 500
    assert json.loads(response.content)["error"]["message"] == "EngineCore died"


async def test_a_clients_mistake_that_the_engine_finds_in_a_stream_is_a_400() -> None:
    document = b'{"error": {"message": "temperature", "param": "temperature", "code": 400}}'
    replica = Replica(streaming(b"data: " + document + b"\n\n", DONE))
    response = await replica.ask()
    assert (response.status, response.content) == (400, document)
    assert response.headers["content-type"] == "application/json"
    assert replica.account.statuses == ["400"]


@pytest.mark.parametrize("dead", [False, True])
async def test_a_stream_that_breaks_ends_with_the_failure_and_without_done(dead: bool) -> None:
    replica = Replica(streaming(ROLE, WORD, BROKEN, DONE))
    replica.engine.dead = dead
    response = await replica.ask()
    assert b"".join(response.parts[:-1]) == ROLE + WORD
    assert (response.end.failure, response.end.engine_dead) == ("EngineCore died", dead)
    assert replica.energy.running == {}


async def test_a_failed_check_of_the_answer_is_a_signal() -> None:
    replicas: list[Replica] = []
    replicas.append(Replica(document(200, {}, replicas, text="no json")))
    response = await replicas[0].ask(AnswerRequest("d", validate="json"))
    (signal,) = response.end.signals
    assert (signal.source, signal.value) == ("validator:json", 0.0)


async def test_the_clients_schema_is_read_from_its_body() -> None:
    schema = {"type": "object", "required": ["a"]}
    body = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    replicas: list[Replica] = []
    replicas.append(Replica(document(200, {}, replicas, text='{"b": 1}')))
    response = await replicas[0].ask(
        AnswerRequest("d", validate="json"), body=json.dumps(body).encode()
    )
    assert response.end.signals[0].value == 0.0


async def test_an_answer_cut_by_the_clients_limit_is_no_failure_of_the_slm() -> None:
    replicas: list[Replica] = []
    replicas.append(Replica(document(200, {}, replicas, text="{"), validator="json"))
    assert (await replicas[0].ask(body=b'{"max_tokens": 7}')).end.signals == ()
    assert (await replicas[0].ask(body=b'{"max_tokens": 8}')).end.signals != ()


async def test_a_dead_engine_is_reported_without_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deployments.slm import deployment

    monkeypatch.setattr(deployment, "ENGINE_CHECK_S", 0.0)
    replica = Replica(document(200, {}))
    checks = asyncio.create_task(replica.slm._check_engine_until_dead())
    await asyncio.sleep(0)
    assert not checks.done()
    replica.engine.dead = True
    await checks
    assert replica.reports == [("failed", "died: killed")]


async def test_an_engine_that_hangs_with_a_request_is_reported_as_dead() -> None:
    async def hang(*_request: Any) -> None:
        await asyncio.Event().wait()

    replica = Replica(hang)

    async def after(seconds: float) -> list[tuple[str, str]]:
        for _ in range(int(seconds)):
            replica.clock.advance(1.0)
            await replica.slm._check_engine()
        return replica.reports

    assert await after(2 * STALL_S) == []  # it has no request
    request = asyncio.create_task(replica.ask())
    for _ in range(5):
        await asyncio.sleep(0)
    assert await after(STALL_S - 1) == []
    replica.engine.load.steps += 1  # it is slow, but makes steps
    assert await after(STALL_S) == []
    assert await after(1) == [("failed", "died: no step for 60 s")]
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert replica.answerer.in_engine == 0


async def test_a_replica_keeps_the_ends_of_the_last_prompts_that_came_with_them() -> None:
    replica = Replica(document(200, {"id": 1}))
    for number in range(RECENT_PROMPTS + 1):
        await replica.ask(AnswerRequest("d", prefix_end=(1, number), prompt_tokens=96))
    await replica.ask(AnswerRequest("d"))
    ends = list(replica.answerer.recent_prompts)
    assert ends == [PromptEnd((1, i + 1), 96) for i in range(RECENT_PROMPTS)]
