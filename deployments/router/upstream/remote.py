"""Replies of remote SLMs: providers whose bytes are read before a client gets them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import aiohttp
from pydantic_core import from_json, to_json

from calm_serve.config import Remote, SLMSpec
from calm_serve.types import Cost, EngineFacts
from calm_serve.upstreams import (
    END_EVENTS,
    Answer,
    Api,
    ChatStream,
    Event,
    EventKind,
    EventScanner,
    EventTooLargeError,
    Failure,
    FailureKind,
    Origin,
    StreamReader,
    UpstreamError,
    UpstreamRequest,
    Usage,
    build_request,
    chat_answer,
    classify_response,
    cost,
    encoded,
    may_be_empty,
    read_answer,
    usage_of,
    wrong_content_type,
)
from deployments.router.live_state import VIEW
from deployments.router.upstream.reply import Reply
from deployments.wire import ReplyEnd, deployment_name

if TYPE_CHECKING:
    from deployments.router.upstream.connections import Upstream

APIS = {f"/v1/{api}": api for api in Api}
MAX_ANSWER_BYTES = 64 << 20  # of an unstreamed answer, which is held in memory


class EmptyAnswerError(UpstreamError):
    """The answer has no content. It is delivered if no other SLM answers."""

    def __init__(self, failure: Failure, answer: ReplyEnd) -> None:
        super().__init__(failure)
        self.answer = answer


class RemoteReply(Reply):
    """The reply of a remote SLM: bytes and then a `ReplyEnd`.

    Reading the first item sends the request. Events before the first one with content are kept
    back, so that another SLM can answer if none comes. Raises UpstreamError for every way in which
    the upstream fails, CapacityError beyond `max_concurrent_requests`.
    """

    def __init__(
        self, upstream: Upstream, spec: SLMSpec, remote: Remote, path: str, body: Mapping[str, Any]
    ) -> None:
        self._upstream, self._spec, self._remote = upstream, spec, remote
        self._path, self._body = path, body
        self._queue = upstream.queue(spec)  # nothing waits in it: beyond the limit are other SLMs
        self._origin = Origin(spec.id, local=False, context_tokens=spec.context_tokens)
        self._started_s = time.perf_counter()
        self._ends_at_s = 0.0  # of the event loop's clock
        self._ttft_s = 0.0
        self._answers = False  # a byte of the answer came
        self._events: _Events | None = None
        self._usage: Usage | None = None  # of a whole document
        self._counted = False
        super().__init__()

    async def _open(self) -> Any:
        request = self._request()
        self._count()
        self._ends_at_s = asyncio.get_running_loop().time() + self._remote.timeout_s
        stream = bool(self._body.get("stream"))
        async with self._limit(self._remote.first_byte_timeout_s if stream else None):
            response = await self._upstream.post(
                request.url, request.body, request.headers, self._remote.connect_timeout_s
            )
        self._response = response
        if not 200 <= response.status < 300:
            headers = {name.lower(): value for name, value in response.headers.items()}
            document = await self._read(response)
            raise UpstreamError(
                classify_response(response.status, headers, document, self._origin, time.time())
            )
        failure = wrong_content_type(
            response.headers.get("content-type", ""), stream=stream, origin=self._origin
        )
        if failure is not None:
            raise UpstreamError(failure)
        if not stream:
            return self._whole(request, await self._read(response))
        self._events = _Events(request, self._body, self._origin)
        return await self._events_until(response, self._remote.first_byte_timeout_s)

    @property
    def cost(self) -> Cost | None:
        """What the answer costs as far as it came, a failed one too; None when it is not known."""
        usage = self._usage if self._events is None else self._events.usage
        prices = self._remote.prices
        if usage is None or prices is None:
            return None
        return Cost(cost(usage, prices), prices.currency)

    def _request(self) -> UpstreamRequest:
        api = APIS.get(self._path)
        if api is None:
            return self._plain_request()
        return build_request(
            self._remote, self._spec.model, api, self._body, slm_id=self._spec.id, key=self._key()
        )

    def _plain_request(self) -> UpstreamRequest:
        """A route that all upstreams which have it share: embeddings, ranking."""
        if self._path not in self._remote.routes or not self._path.startswith("/v1/"):
            message = f"the upstream of {self._spec.id!r} has no {self._path}"
            raise UpstreamError(Failure(FailureKind.UNSUPPORTED, message))
        key = self._key().strip()
        headers = {"content-type": "application/json", "accept": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        url = self._remote.base_url.rstrip("/") + self._path.removeprefix("/v1")
        return UpstreamRequest(
            url, headers, encoded({**self._body, "model": self._spec.model}), Api.CHAT
        )

    def _key(self) -> str:
        """Return the API key, which the SLM's own replica read from its environment."""
        chooser = VIEW.chooser(deployment_name(self._spec.id))
        chosen = chooser.choose({}) if chooser is not None else None
        if chosen is None:
            message = f"SLM {self._spec.id!r} has no replica"
            raise UpstreamError(Failure(FailureKind.TRANSPORT, message))
        return chosen.address["secret"]

    def _count(self) -> None:
        if self._upstream.running[self._spec.id] >= self._remote.max_concurrent_requests:
            raise self._queue.full("is at its limit of concurrent requests")
        self._upstream.running[self._spec.id] += 1
        self._queue.take()
        self._counted = True

    def _limit(self, seconds: float | None) -> asyncio.Timeout:
        """Return a time limit that also ends with the whole answer's."""
        ends_at_s = self._ends_at_s
        if seconds is not None:
            ends_at_s = min(ends_at_s, asyncio.get_running_loop().time() + seconds)
        return asyncio.timeout_at(ends_at_s)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        parts: list[bytes] = []
        size = 0
        async with self._limit(None):
            while part := await response.content.readany():
                self._answers = True
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    message = f"{self._spec.id!r} sent an answer that is too large"
                    raise UpstreamError(Failure(FailureKind.BAD_ANSWER, message))
        return b"".join(parts)

    def _whole(self, request: UpstreamRequest, document: bytes) -> ReplyEnd:
        if self._path in APIS:
            answer = read_answer(
                document, request.api, self._origin, empty_is_fine=may_be_empty(self._body)
            )
        else:
            answer = self._plain_answer(document)
        self._usage = answer.usage
        self._ttft_s = time.perf_counter() - self._started_s
        if request.translated and answer.failure is None:
            document = to_json(chat_answer(from_json(document), int(time.time())))
        end = ReplyEnd(document, self._facts(answer))
        self._finish()
        if answer.failure is not None:
            raise _failed(answer.failure, end)
        return end

    def _plain_answer(self, document: bytes) -> Answer:
        try:
            found = from_json(document)
        except ValueError:
            found = None
        if isinstance(found, dict) and "error" not in found:
            return Answer(usage=usage_of(found))
        message = f"{self._spec.id!r} answered with what is no answer"
        return Answer(Failure(FailureKind.BAD_ANSWER, message))

    async def _next_part(self, response: aiohttp.ClientResponse) -> Any:
        return await self._events_until(response, self._remote.idle_timeout_s)

    async def _events_until(self, response: aiohttp.ClientResponse, limit_s: float) -> Any:
        """Return what the client gets next; each read may take `limit_s`."""
        assert self._events is not None
        while True:
            async with self._limit(limit_s):
                chunk = await response.content.readany()
            self._answers = True
            if not chunk:
                tail, answer = self._events.finish()
                end = ReplyEnd(tail, self._facts(answer))
                self._finish()
                if answer.failure is not None:
                    raise _failed(answer.failure, end)
                return end
            if part := self._events.feed(chunk):
                self._ttft_s = self._ttft_s or time.perf_counter() - self._started_s
                return part

    def _facts(self, answer: Answer) -> EngineFacts:
        usage = answer.usage
        output_tokens = usage.output_tokens if usage else 0
        return EngineFacts(
            prompt_tokens=usage.prompt_tokens if usage else 0,
            cached_tokens=usage.cached_tokens if usage else 0,
            output_tokens=output_tokens,
            ttft_s=self._ttft_s,
            energy_j=output_tokens * self._spec.priors.energy_j_per_token,
            running=self._upstream.running[self._spec.id],
        )

    def _failure_of(self, error: Exception) -> Failure:
        slm_id = self._spec.id
        if isinstance(error, EventTooLargeError):
            message = f"{slm_id!r} sent an event that is too large"
            return Failure(FailureKind.BAD_ANSWER, message)
        if not isinstance(error, TimeoutError):
            message = f"the upstream of {slm_id!r}: {type(error).__name__}"
            return Failure(FailureKind.TRANSPORT, message)
        over = asyncio.get_running_loop().time() >= self._ends_at_s
        if over and self._answers:
            # The operator's limit ended an answer that was on its way.
            message = f"{slm_id!r} did not finish in {self._remote.timeout_s:g} s"
            return Failure(FailureKind.OUT_OF_TIME, message)
        return Failure(FailureKind.TIMED_OUT, f"the upstream of {slm_id!r}: TimeoutError")

    def _count_end(self) -> None:
        if self._counted:
            self._counted = False
            self._upstream.running[self._spec.id] -= 1
            self._queue.give_back(answered=self._response is not None)


class _Events:
    """The events of one stream, as the client gets them."""

    def __init__(self, request: UpstreamRequest, body: Mapping[str, Any], origin: Origin) -> None:
        choices = body.get("n")
        self._scanner = EventScanner()
        self._reader = StreamReader(
            request.api,
            origin,
            empty_is_fine=may_be_empty(body),
            choices=choices if isinstance(choices, int) else 1,
        )
        self._request = request
        options = body.get("stream_options")
        wants_usage = isinstance(options, Mapping) and bool(options.get("include_usage"))
        self._chat: ChatStream | None = None
        if request.translated:
            self._chat = ChatStream(int(time.time()), include_usage=wants_usage)
        self._held: list[bytes] = []  # before the first content

    @property
    def usage(self) -> Usage | None:
        """Tokens as far as the upstream reported them."""
        return self._reader.usage

    def feed(self, chunk: bytes) -> bytes:
        """Return what the client gets of the events that `chunk` completes.

        Raises UpstreamError for an error event, EventTooLargeError.
        """
        return self._pass_on(self._scanner.feed(chunk))

    def finish(self) -> tuple[bytes, Answer]:
        """Return the end of the stream, and what the whole stream was."""
        last = self._pass_on(self._scanner.finish())
        answer = self._reader.finish(truncated=self._scanner.truncated)
        tail = b"".join(self._held) + last
        if self._chat is not None:
            tail += self._chat.end()
        elif answer.lacks_end:
            tail += END_EVENTS[self._request.api]
        return tail, answer

    def _pass_on(self, events: list[Event]) -> bytes:
        parts: list[bytes] = []
        for event in events:
            kind = self._reader.read(event)
            if kind is EventKind.ERROR and self._reader.failure is not None:
                raise UpstreamError(self._reader.failure)
            if self._chat is not None:
                parts.append(self._chat.translate(event))
            elif not (kind is EventKind.USAGE and self._request.hides_usage):
                parts.append(event.raw)
        if not self._reader.committed:
            self._held += parts
            return b""
        parts = self._held + parts
        self._held = []
        return b"".join(parts)


def _failed(failure: Failure, end: ReplyEnd) -> UpstreamError:
    if failure.consequence.deliver:
        return EmptyAnswerError(failure, end)
    return UpstreamError(failure)
