"""Replies of the fleet's own replicas."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import aiohttp

from calm_serve.config import SLMSpec
from calm_serve.protocol.answers import ANSWER_END, ANSWER_REQUEST, AnswerEnd, AnswerRequest
from calm_serve.upstreams import (
    Failure,
    FailureKind,
    Origin,
    UpstreamError,
    classify_response,
    engine_death,
)
from deployments.router.chosen import ChosenReplica, ReplicaChooser
from deployments.router.live_state import VIEW
from deployments.router.upstream.end_scanner import EndScanner
from deployments.router.upstream.reply import Reply
from deployments.router.upstream.slot_queue import Position
from deployments.wire import (
    END_HEADER,
    NO_ANSWER_HEADER,
    ONGOING_HEADER,
    REQUEST_HEADER,
    SECRET_HEADER,
    AsleepReply,
    Hints,
    NoAnswer,
    ReplyEnd,
    deployment_name,
)

if TYPE_CHECKING:
    from deployments.router.upstream.connections import Upstream


class LocalReply(Reply):
    """The reply of an SLM of the fleet: bytes and then a `ReplyEnd`, or one `AsleepReply`.

    Reading the first item chooses the replica and sends the request; a replica that is full is
    replaced by the next one. Raises UpstreamError for every way in which an SLM fails, and
    CapacityError when the queue for its replicas is too long.
    """

    def __init__(
        self,
        upstream: Upstream,
        spec: SLMSpec,
        path: str,
        body: bytes,
        asked: AnswerRequest,
        hints: Hints,
    ) -> None:
        self._upstream, self._slm_id, self._path, self._body = upstream, spec.id, path, body
        self._origin = Origin(spec.id, local=True, context_tokens=spec.context_tokens)
        self._hints = hints
        self._queue = upstream.queue(spec)
        self._wait_limit_s = hints.get("wait_limit_s", math.inf)
        self._headers = {
            "content-type": "application/json",
            REQUEST_HEADER: ANSWER_REQUEST.encode(asked).decode(),
        }
        self._chooser: ReplicaChooser | None = None
        self._chosen: ChosenReplica | None = None
        self._scanner = EndScanner()
        self._time_limit: asyncio.Timeout | None = None  # until the replica begins to answer
        self._left_with: int | None = None  # other requests in a replica that failed silently
        super().__init__()

    async def _open(self) -> Any:
        queue = self._queue
        tried: set[str] = set()
        position: Position | None = None
        if queue:
            position = queue.enter(self._wait_limit_s)
            await queue.wait(position)
        while True:
            chosen = await self._choose(tried)
            if chosen is None:
                position = position or queue.enter(self._wait_limit_s)
                await queue.wait(position)
                tried.clear()
                continue
            response = await self._post(chosen)
            reason = response.headers.get(NO_ANSWER_HEADER)
            if reason != NoAnswer.FULL:
                return await self._first(response, reason)
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
                message = f"SLM {self._slm_id!r} has no replica"
                raise UpstreamError(Failure(FailureKind.TRANSPORT, message))
        if chosen is not None and not tried:
            VIEW.routed(self._hints.get("decision_id", ""), chosen.replica_id)
        return chosen

    async def _post(self, chosen: ChosenReplica) -> aiohttp.ClientResponse:
        assert self._chooser is not None
        self._chosen = chosen
        self._upstream.begun(chosen.replica_id, self)
        self._chooser.sent(chosen.replica_id, self._hints)
        self._queue.take()
        headers = {**self._headers, SECRET_HEADER: chosen.address["secret"]}
        try:
            async with asyncio.timeout(self._hints.get("first_byte_limit_s")) as self._time_limit:
                response = await self._upstream.post(
                    chosen.address["url"] + self._path, self._body, headers
                )
        except aiohttp.ClientConnectorError as error:
            self._chooser.answered(chosen.replica_id, self._hints, accepted=False, ongoing=None)
            if isinstance(error.os_error, ConnectionRefusedError):
                # Nobody has its port any more, so its process has ended.
                VIEW.died(deployment_name(self._slm_id), chosen.replica_id)
            raise
        self._response = response
        self._chooser.answered(
            chosen.replica_id,
            self._hints,
            accepted=response.status == 200,
            ongoing=_ongoing(response),
        )
        return response

    async def _first(self, response: aiohttp.ClientResponse, reason: str | None) -> Any:
        if response.status == 200 and response.content_type == "text/event-stream":
            return await self._next_part(response)
        document = await response.read()
        self._finish()
        if response.status == 200:
            end = ANSWER_END.decode(response.headers.get(END_HEADER, ""))
            return ReplyEnd(document, end.facts, end.signals)
        if reason == NoAnswer.ASLEEP:
            return AsleepReply()
        if reason in (NoAnswer.DEAD, NoAnswer.GONE):
            others = (_ongoing(response) or 1) - 1
            raise UpstreamError(self._death(reason == NoAnswer.DEAD, others))
        headers = {name.lower(): value for name, value in response.headers.items()}
        raise UpstreamError(
            classify_response(response.status, headers, document, self._origin, time.time())
        )

    async def _next_part(self, response: aiohttp.ClientResponse) -> Any:
        while True:
            part = await response.content.readany()
            if not part:
                return self._ended(self._scanner.end())
            if part := self._scanner.feed(part):
                return part

    def _ended(self, end: AnswerEnd | None) -> ReplyEnd:
        self._finish()
        if end is None:
            raise self._lost()
        if end.engine_dead:
            raise UpstreamError(self._death(True, end.ongoing))
        if end.failure:
            raise UpstreamError(Failure(FailureKind.SERVER_ERROR, end.failure))
        return ReplyEnd(b"", end.facts, end.signals)

    def _death(self, was_running: bool, others: int) -> Failure:
        if self._chosen is not None:
            VIEW.died(deployment_name(self._slm_id), self._chosen.replica_id)
        deaths = self._hints.get("engine_deaths", 0)
        return engine_death(self._slm_id, was_running=was_running, others=others, deaths=deaths)

    def _lost(self) -> UpstreamError:
        message = f"the connection to SLM {self._slm_id!r} was lost"
        return UpstreamError(Failure(FailureKind.TRANSPORT, message))

    def _end_attempt(self) -> None:
        self._free_slot(answered=False)
        self._response, self._chosen = None, None

    def _count_end(self) -> None:
        if self._chosen is not None:
            self._free_slot(answered=self._response is not None)
            self._queue.next()

    def _free_slot(self, *, answered: bool) -> None:
        if self._chooser is not None and self._chosen is not None:
            self._upstream.ended(self._chosen.replica_id, self)
            self._chooser.finished(self._chosen.replica_id)
            self._queue.give_back(answered=answered)

    def break_off(self, others: int) -> None:
        """Fail: the replica has failed, and does not end the reply itself.

        `others` are the requests that it worked on beside this one.
        """
        self._left_with = others
        if self._response is not None:
            # Its reader waits for a part, and wakes up with this.
            self._response.content.set_exception(aiohttp.ClientPayloadError("the replica failed"))
        elif self._time_limit is not None:
            self._time_limit.reschedule(asyncio.get_running_loop().time())

    def _failure_of(self, error: Exception) -> Failure:
        if self._left_with is not None:
            return self._death(True, self._left_with)
        if isinstance(error, TimeoutError):
            message = f"SLM {self._slm_id!r} has not begun to answer in time"
            return Failure(FailureKind.TIMED_OUT, message)
        return self._lost().failure


def _ongoing(response: aiohttp.ClientResponse) -> int | None:
    ongoing = response.headers.get(ONGOING_HEADER, "")
    return int(ongoing) if ongoing.isdecimal() else None
