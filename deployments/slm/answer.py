"""How an SLM replica answers: the router's requests to vLLM's own HTTP application.

Each request is checked (secret, route), entered in Serve's books, waits until the engine is awake
and its adapter loaded, and then belongs to vLLM. The answer's bytes pass unchanged; afterwards an
`AnswerEnd` tells the router what only this process knows.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from pydantic_core import from_json

from calm_serve.config import SLMSpec
from calm_serve.errors import AsleepError, CalmError, ComponentError, RequestError
from calm_serve.protocol.answers import ANSWER_END, ANSWER_REQUEST, AnswerEnd, AnswerRequest
from calm_serve.requests import ROUTES
from calm_serve.types import EngineFacts, PromptEnd, QualitySignal
from calm_serve.validation import validate
from deployments.slm.adapters import ResidentAdapter
from deployments.slm.serve_account import FullError, ServeAccount
from deployments.slm.sleep import ReplicaResidency
from deployments.wire import (
    END_EVENT,
    END_HEADER,
    NO_ANSWER_HEADER,
    ONGOING_HEADER,
    REQUEST_HEADER,
    SECRET_HEADER,
    NoAnswer,
)

log = logging.getLogger("ray.serve")

MAX_KEPT_CHARS = 65_537  # one more than the validators accept, so that a truncated answer fails
RECENT_PROMPTS = 32
"""Prompts of which all routers learn at Serve's next poll: what a replica accepts in a second.

Each is about 30 bytes of every broadcast.
"""
_CHAT = "/v1/chat/completions"
_ERROR_EVENTS = (b'data: {"error"', b"event: error\n", b"event: response.failed\n")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class ServedEngine(Protocol):
    """The engine behind a replica."""

    app: Any
    load: Any

    def observed(self, facts: Any) -> Any:
        """Record in `facts` what the engine does inside this block."""


class Answerer:
    """The ASGI application on a replica's own port.

    Args:
        spec: the SLM.
        replica_id: of this replica.
        secret: that a request must bring.
        engine: answers.
        facts: creates the record of one request's facts (`RequestFacts`).
        account: Serve's books.
        residency: wakes the engine.
        energy: attributes energy to requests.
        load_adapter: returns a resident adapter, through Serve's multiplexing.
        check_engine: finds out whether the engine has died.
    """

    def __init__(
        self,
        spec: SLMSpec,
        replica_id: str,
        secret: str,
        engine: ServedEngine,
        *,
        facts: Callable[..., Any],
        account: ServeAccount,
        residency: ReplicaResidency,
        energy: Any,
        load_adapter: Callable[[str], Awaitable[ResidentAdapter]],
        check_engine: Callable[[], Awaitable[None]],
    ) -> None:
        self._spec, self._replica_id = spec, replica_id
        self._secret = secret.encode()
        self._engine, self._facts_type = engine, facts
        self._account, self._residency, self._energy = account, residency, energy
        self._load_adapter, self._check_engine = load_adapter, check_engine
        self._calls = itertools.count()
        self.in_engine = 0  # requests that vLLM's application works on
        self.recent_prompts: deque[PromptEnd] = deque(maxlen=RECENT_PROMPTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers: Headers = scope["headers"]
        secret = _header(headers, SECRET_HEADER)
        if not hmac.compare_digest(secret, self._secret):
            await _refuse(send, 401, RequestError("this port is for the routers of the fleet"))
            return
        path = scope["path"]
        # An allow-list: the engine's other routes control it (adapters, sleep, caches, profiling).
        if path not in ROUTES or scope["method"] != "POST":
            await _refuse(send, 404, RequestError(f"{path} is not a route of an SLM"))
            return
        try:
            asked = ANSWER_REQUEST.decode(_header(headers, REQUEST_HEADER))
        except CalmError as error:
            await _refuse(send, 400, error)
            return
        try:
            async with self._account.request(
                route=path, request_id=asked.decision_id, adapter=asked.adapter
            ) as set_status:
                await self._admitted(scope, receive, send, asked, set_status)
        except FullError:
            full = ComponentError(f"replica {self._replica_id} is full")
            await _refuse(send, 503, full, NoAnswer.FULL, self._account.ongoing)

    async def _admitted(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        asked: AnswerRequest,
        set_status: Callable[[str], None],
    ) -> None:
        answer: _Answer | None = None
        try:
            # Loading an adapter needs the engine's memory too.
            async with self._residency.awake(asked.residency_revision):
                body = await _read(receive)
                answer = self._answer(scope, send, body, asked)
                if asked.prefix_end:
                    self.recent_prompts.append(PromptEnd(asked.prefix_end, asked.prompt_tokens))
                if not asked.adapter:
                    await self._run(scope, receive, body, answer)
                else:
                    resident = await self._load_adapter(asked.adapter)
                    with resident.in_use():
                        await self._run(scope, receive, body, answer)
            set_status(str(answer.status or 499))
        except CalmError as error:
            await self._check_engine()
            dead = self._residency.state == "failed"
            if answer is not None and answer.begun:
                await answer.break_off(error.message, dead)
                set_status("500")
                return
            reason: NoAnswer | None = None
            if isinstance(error, AsleepError):
                reason = NoAnswer.ASLEEP
            elif dead:
                reason = NoAnswer.GONE if answer is None else NoAnswer.DEAD
            set_status(str(error.http_status))
            await _refuse(send, error.http_status, error, reason, self._account.ongoing)

    def _answer(self, scope: Scope, send: Send, body: bytes, asked: AnswerRequest) -> _Answer:
        kinds = {asked.validate, self._spec.validator} - {""}
        key = str(next(self._calls))
        answer = _Answer(self, send, scope["path"], key, kinds, body, asked)
        answer.facts = self._facts_type(
            on_tokens=lambda tokens: self._count(answer, tokens), keep_text=bool(kinds)
        )
        return answer

    def _count(self, answer: _Answer, tokens: int) -> None:
        if answer.energy is None:
            self._energy.add_tokens(answer.key, tokens)

    def _finish(self, answer: _Answer) -> Any:
        if answer.energy is None:
            answer.energy = self._energy.finish(answer.key)
        return answer.energy

    async def _run(self, scope: Scope, receive: Receive, body: bytes, answer: _Answer) -> None:
        inner = dict(scope)
        inner["headers"] = [(k, v) for k, v in scope["headers"] if not k.startswith(b"x-calm-")]
        self._energy.start(answer.key)
        self.in_engine += 1
        try:
            with self._engine.observed(answer.facts):
                await self._engine.app(inner, _replay(body, receive), answer.send)
        finally:
            self.in_engine -= 1
            self._finish(answer)
            if not answer.ended:
                request_id = answer.asked.decision_id or "?"
                log.info("request %s ended with an incomplete answer", request_id)
        if answer.failure is not None:
            raise answer.failure

    def end_of(self, answer: _Answer, signals: tuple[QualitySignal, ...]) -> AnswerEnd:
        """Return the facts of an answer as it ends."""
        facts, load = answer.facts, self._engine.load
        energy = self._finish(answer)
        return AnswerEnd(
            EngineFacts(
                replica_id=self._replica_id,
                prompt_tokens=facts.prompt_tokens,
                cached_tokens=facts.cached_tokens,
                output_tokens=facts.output_tokens,
                queue_s=facts.queue_s,
                ttft_s=facts.ttft_s,
                energy_j=energy.energy_j,
                energy_source=energy.source,
                running=load.running,
                waiting=load.waiting,
                kv_usage_ratio=load.kv_usage_ratio,
            ),
            signals,
            ongoing=max(0, self.ongoing - 1),
        )

    @property
    def ongoing(self) -> int:
        """Requests in this replica, as Serve counts them."""
        return self._account.ongoing

    def signals_of(self, answer: _Answer) -> tuple[QualitySignal, ...]:
        """Check an answer's text; may take a while."""
        kinds, asked = answer.kinds, answer.asked
        fields = _fields(answer.body)
        limit_tokens = fields.get("max_completion_tokens") or fields.get("max_tokens")
        if isinstance(limit_tokens, int) and answer.facts.output_tokens >= limit_tokens:
            # The client's limit may have truncated the answer: no failure of the SLM.
            kinds = kinds & {asked.validate}
        text = "".join(answer.facts.text)[:MAX_KEPT_CHARS]
        signals = []
        for kind in sorted(kinds):
            signal = validate(kind, text, schema=_schema(fields), labels=asked.labels)
            # That an answer has its SLM's own format is no evidence unless the client asked for it:
            # a well-formed SQL answer to a request for a poem is wrong. A malformed one always is.
            if kind == asked.validate or signal.value < 1.0:
                signals.append(signal)
        return tuple(signals)


class _Answer:
    """One answer on its way out, as ASGI messages."""

    def __init__(
        self,
        answerer: Answerer,
        send: Send,
        path: str,
        key: str,
        kinds: set[str],
        body: bytes,
        asked: AnswerRequest,
    ) -> None:
        self.key, self.kinds, self.body, self.asked = key, kinds, body, asked
        self.facts: Any = None
        self.energy: Any = None  # None until the engine has finished
        self.failure: ComponentError | None = None
        self.status = 0
        self.begun = self.ended = False
        self._answerer, self._send = answerer, send
        self._start: Message | None = None
        self._streamed = False
        self._held = b""
        # A chat stream's first event has the role only; it goes out with the first text.
        self._hold_next = path == _CHAT

    async def send(self, message: Message) -> None:
        """Take a message of vLLM's application."""
        if message["type"] == "http.response.start":
            self._start, self.status = message, message["status"]
            kind = _header(message["headers"], "content-type")
            self._streamed = kind.startswith(b"text/event-stream")
            return
        if self.ended:
            return
        part, more = message.get("body", b""), message.get("more_body", False)
        if not self._streamed:
            self._held += part
            if not more:
                await self._send_document()
            return
        if part.startswith(_ERROR_EVENTS):
            await self._stop(part[part.find(b"data: ") + len(b"data: ") :].strip())
            return
        part, self._held = self._held + part, b""
        if self._hold_next and more and part:
            self._hold_next, self._held = False, part
            return
        await self._send_part(part)
        if not more:
            await self._end_stream()

    async def break_off(self, message: str, dead: bool) -> None:
        """End a stream whose engine failed after it had begun."""
        ongoing = max(0, self._answerer.ongoing - 1)
        end = AnswerEnd(
            EngineFacts(), ongoing=ongoing, failure=message or "failed", engine_dead=dead
        )
        await self._send_end(end)

    async def _stop(self, document: bytes) -> None:
        """End a stream with an error event; vLLM would end it as if the answer were complete."""
        status = _status_of(document)
        if self.begun or status >= 500:
            self._fail(status, document)
            return
        # vLLM validates some parameters of a stream after its status line: the client's mistake.
        assert self._start is not None
        headers = [(b"content-type", b"application/json")]
        self._start = {**self._start, "status": status, "headers": headers}
        self.status, self._held = status, document
        await self._send_document()

    def _fail(self, status: int, document: bytes) -> None:
        self.ended = True  # what vLLM still sends is dropped
        self.failure = ComponentError(_message_of(document))
        self.failure.http_status = status

    async def _send_part(self, part: bytes) -> None:
        if not self.begun:
            self.begun = True
            start = self._start
            assert start is not None
            extra = (ONGOING_HEADER.encode(), str(self._answerer.ongoing).encode())
            await self._send({**start, "headers": [*start["headers"], extra]})
        if part:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def _end_stream(self) -> None:
        self.ended = True
        await self._send_end(self._answerer.end_of(self, await self._signals()))

    async def _send_end(self, end: AnswerEnd) -> None:
        event = END_EVENT + ANSWER_END.encode(end) + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _send_document(self) -> None:
        start = self._start
        assert start is not None
        if self.status >= 500:
            self._fail(self.status, self._held)
            return
        self.begun = self.ended = True
        signals = await self._signals() if self.status < 400 else ()
        end = ANSWER_END.encode(self._answerer.end_of(self, signals))
        await self._send({**start, "headers": [*start["headers"], (END_HEADER.encode(), end)]})
        await self._send({"type": "http.response.body", "body": self._held, "more_body": False})

    async def _signals(self) -> tuple[QualitySignal, ...]:
        if not self.kinds:
            return ()
        # In a thread: checking against a client's schema may take a while.
        return await asyncio.to_thread(self._answerer.signals_of, self)


def _header(headers: Any, name: str) -> bytes:
    wanted = name.encode()
    return next((value for key, value in headers if key == wanted), b"")


async def _read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the router has gone")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body first, and then waits for the disconnection."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def again() -> Message:
        nonlocal message
        if message is not None:
            first, message = message, None
            return first
        return await receive()

    return again


async def _refuse(
    send: Send,
    status: int,
    error: CalmError,
    reason: NoAnswer | None = None,
    ongoing: int | None = None,
) -> None:
    headers: Headers = [(b"content-type", b"application/json")]
    if reason is not None:
        headers.append((NO_ANSWER_HEADER.encode(), reason.encode()))
    if ongoing is not None:
        headers.append((ONGOING_HEADER.encode(), str(ongoing).encode()))
    body = json.dumps(error.to_openai()).encode()
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _fields(body: bytes) -> dict[str, Any]:
    fields = from_json(body)
    return fields if isinstance(fields, dict) else {}


def _schema(fields: dict[str, Any]) -> dict[str, Any] | None:
    shape = fields.get("response_format")
    schema = shape.get("json_schema") if isinstance(shape, dict) else None
    found = schema.get("schema") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else None


def _status_of(document: bytes) -> int:
    try:
        code = from_json(document)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return 500
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _message_of(document: bytes) -> str:
    try:
        return str(from_json(document.strip())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the engine failed"
