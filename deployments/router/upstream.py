"""Requests to SLM replicas over HTTP: the router's end of every answer's bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import aiohttp
from pydantic_core import to_json

from calm_serve.errors import CapacityError, KnowledgeError, SLMUnavailableError
from calm_serve.protocol.answers import ANSWER_END, ANSWER_REQUEST, AnswerEnd, AnswerRequest
from deployments.router.chosen import ChosenReplica, ReplicaChooser
from deployments.router.live_state import VIEW
from deployments.wire import (
    END_EVENT,
    END_HEADER,
    ONGOING_HEADER,
    REFUSAL_HEADER,
    REQUEST_HEADER,
    SECRET_HEADER,
    ErrorReply,
    Hints,
    Refusal,
    ReplyEnd,
    deployment_name,
    served_name,
)

log = logging.getLogger("ray.serve")

CONNECT_TIMEOUT_S = 1.0  # a replica that is alive accepts in milliseconds
RETRY_AFTER_S = 1.0
SLOT_POLL_S = 0.05  # between two attempts of the first in a queue
READ_BUFFER_BYTES = 1 << 18
KEEP_ALIVE_S = 60.0
MAX_HEADER_BYTES = 1 << 16  # facts and signals of a whole document


class SlotQueue:
    """Requests of one SLM that wait because all its replicas are full, first come first served."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self) -> None:
        """Wait until it is this request's turn to try again.

        A slot that another router's request frees is not seen here, hence the time limit.
        """
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=SLOT_POLL_S)
                if self._waiting and self._waiting[0] is turn:
                    return
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)
            if turn.cancelled():
                self.next()

    def next(self) -> None:
        """Give the first one its turn."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


class Upstream:
    """Connections of one router process to all replicas.

    Args:
        may_queue: SLM -> most requests that may wait for a slot of it.
        start_replica: SLM -> waits until a replica of an SLM without any has started; None for an
            SLM that always has replicas.
    """

    def __init__(
        self,
        may_queue: Callable[[str], int],
        start_replica: Callable[[str], Awaitable[object] | None],
    ) -> None:
        self.may_queue, self.start_replica = may_queue, start_replica
        self._queues: dict[str, SlotQueue] = {}  # one per SLM that ever was in the fleet
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            max_field_size=MAX_HEADER_BYTES,
        )

    def call(
        self, slm_id: str, path: str, body: Mapping[str, Any], asked: AnswerRequest, hints: Hints
    ) -> Reply:
        """Return the reply of an SLM, which sends the request when its first item is read."""
        named = {**body, "model": served_name(slm_id, asked.adapter)}
        return Reply(self, slm_id, path, to_json(named), asked, hints)

    def queue(self, slm_id: str) -> SlotQueue:
        """Return the requests that wait for a slot of an SLM."""
        return self._queues.setdefault(slm_id, SlotQueue())

    async def post(
        self, chosen: ChosenReplica, path: str, body: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Send a request to a replica; return as soon as the answer's headers are here."""
        return await self._session.post(
            chosen.address["url"] + path,
            data=body,
            headers={**headers, SECRET_HEADER: chosen.address["secret"]},
            allow_redirects=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


class Reply:
    """One SLM's reply: bytes and then a `ReplyEnd`, or one `ErrorReply`.

    Reading the first item chooses the replica and sends the request; a replica that is full is
    replaced by the next one. Raises SLMUnavailableError when no replica can be reached and when a
    reply breaks off, CapacityError when all are full.
    """

    def __init__(
        self,
        upstream: Upstream,
        slm_id: str,
        path: str,
        body: bytes,
        asked: AnswerRequest,
        hints: Hints,
    ) -> None:
        self._upstream, self._slm_id, self._path, self._body = upstream, slm_id, path, body
        self._hints = hints
        self._headers = {
            "content-type": "application/json",
            REQUEST_HEADER: ANSWER_REQUEST.encode(asked).decode(),
        }
        self._chooser: ReplicaChooser | None = None
        self._chosen: ChosenReplica | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._scanner = EndScanner()
        self._over = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._response is None:
                return await self._open()
            return await self._next_part(self._response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.cancel()
            raise SLMUnavailableError(
                f"SLM {self._slm_id!r}: {type(error).__name__} at replica {self._replica_id!r}"
            ) from error
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Break off: close the connection, which ends the work in the replica."""
        if self._response is not None:
            self._response.close()
        self._finish()

    @property
    def _replica_id(self) -> str:
        return self._chosen.replica_id if self._chosen is not None else ""

    async def _open(self) -> Any:
        queue = self._upstream.queue(self._slm_id)
        tried: set[str] = set()
        if queue:
            await self._wait_for_slot(queue)
        while True:
            chosen = await self._choose(tried)
            if chosen is None:
                await self._wait_for_slot(queue)
                tried.clear()
                continue
            response = await self._post(chosen)
            refusal = response.headers.get(REFUSAL_HEADER)
            if refusal != Refusal.FULL:
                return await self._first(response, refusal)
            tried.add(chosen.replica_id)
            await response.read()  # leaves the connection usable
            self._end_attempt()

    async def _choose(self, tried: set[str]) -> ChosenReplica | None:
        """Return a replica that is not in `tried`; None when all were tried."""
        name = deployment_name(self._slm_id)
        self._chooser = VIEW.chooser(name)
        chosen = self._chooser.choose(self._hints, tried) if self._chooser else None
        if chosen is None and not tried:
            started = self._upstream.start_replica(self._slm_id)
            if started is not None:
                await started
                self._chooser = VIEW.chooser(name)
                chosen = self._chooser.choose(self._hints, tried) if self._chooser else None
            if chosen is None:
                raise SLMUnavailableError(f"SLM {self._slm_id!r} has no replica")
        if chosen is not None and not tried:
            VIEW.routed(self._hints.get("decision_id", ""), chosen.replica_id)
        return chosen

    async def _wait_for_slot(self, queue: SlotQueue) -> None:
        if len(queue) >= self._upstream.may_queue(self._slm_id):
            message = f"SLM {self._slm_id!r} is at its queue limit"
            raise CapacityError(message, retry_after_s=RETRY_AFTER_S)
        await queue.wait()

    async def _post(self, chosen: ChosenReplica) -> aiohttp.ClientResponse:
        assert self._chooser is not None
        self._chosen = chosen
        self._chooser.sent(chosen.replica_id)
        try:
            response = await self._upstream.post(chosen, self._path, self._body, self._headers)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, ConnectionRefusedError):
                # Nobody has its port any more, so its process has ended.
                VIEW.died(deployment_name(self._slm_id), chosen.replica_id)
            raise
        self._response = response
        ongoing = response.headers.get(ONGOING_HEADER, "")
        self._chooser.answered(
            chosen.replica_id,
            self._hints,
            accepted=response.status == 200,
            ongoing=int(ongoing) if ongoing.isdecimal() else None,
        )
        return response

    async def _first(self, response: aiohttp.ClientResponse, refusal: str | None) -> Any:
        if response.status == 200 and response.content_type == "text/event-stream":
            return await self._next_part(response)
        document = await response.read()
        if response.status == 200:
            end = ANSWER_END.decode(response.headers.get(END_HEADER, ""))
            self._finish()
            return ReplyEnd(document, end.facts, end.signals)
        self._finish()
        return ErrorReply(
            response.status,
            document,
            asleep=refusal == Refusal.ASLEEP,
            dead_replica=self._replica_id if refusal == Refusal.DEAD else "",
        )

    async def _next_part(self, response: aiohttp.ClientResponse) -> Any:
        while True:
            part = await response.content.readany()
            if not part:
                end = self._scanner.end()
                self._finish()
                return self._ended(end)
            if part := self._scanner.feed(part):
                return part

    def _ended(self, end: AnswerEnd | None) -> Any:
        if end is None:
            raise SLMUnavailableError(f"SLM {self._slm_id!r} broke off its answer")
        if end.failure:
            dead = self._replica_id if end.engine_dead else ""
            return ErrorReply(500, end.failure.encode(), dead_replica=dead)
        return ReplyEnd(b"", end.facts, end.signals)

    def _end_attempt(self) -> None:
        if self._chooser is not None and self._chosen is not None:
            self._chooser.finished(self._chosen.replica_id)
        self._response, self._chosen = None, None

    def _finish(self) -> None:
        """Count the request as over, once."""
        if not self._over:
            self._over = True
            if self._chooser is not None and self._chosen is not None:
                self._chooser.finished(self._chosen.replica_id)
                self._upstream.queue(self._slm_id).next()


class EndScanner:
    """Takes the replica's last event off a stream, whatever its chunks are.

    A chunk is passed on at once unless its end may be the beginning of that event.
    """

    def __init__(self) -> None:
        self._held = b""
        self._event: list[bytes] = []  # the last event, from its beginning on
        self._at_line_start = True

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes that belong to the answer."""
        if self._event:
            self._event.append(chunk)
            return b""
        data = self._held + chunk if self._held else chunk
        self._held = b""
        begin = self._find(data)
        if begin >= 0:
            self._event.append(data[begin:])
            return data[:begin]
        if not data.endswith(b"\n"):
            cut = data.rfind(b"\n") + 1
            tail = data[cut:]
            if (cut or self._at_line_start) and END_EVENT.startswith(tail[: len(END_EVENT)]):
                self._held, data = tail, data[:cut]
        if data:
            self._at_line_start = data.endswith(b"\n")
        return data

    def end(self) -> AnswerEnd | None:
        """Return the last event; None when the stream broke off before it was complete."""
        event = b"".join(self._event)
        if not event.endswith(b"\n\n"):
            return None
        with contextlib.suppress(KnowledgeError):
            return ANSWER_END.decode(event[len(END_EVENT) :].strip())
        return None

    def _find(self, data: bytes) -> int:
        begin = data.find(END_EVENT)
        while begin >= 0:
            if data[begin - 1 : begin] == b"\n" if begin else self._at_line_start:
                return begin
            begin = data.find(END_EVENT, begin + 1)
        return -1
