"""Dispatch: calls the chosen SLM and fails over to the next one until the first byte came.

After the first byte nothing is retried, because the client has it. Every call ends in exactly one
outcome, also when the client disconnects.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from calm_serve.errors import AsleepError, CalmError, CapacityError, SLMUnavailableError
from calm_serve.protocol.answers import AnswerRequest
from calm_serve.types import (
    Cost,
    Decision,
    DecisionPath,
    DecisionReason,
    FailedAttempt,
    SLMState,
)
from calm_serve.upstreams import (
    POISON_DEATHS,
    EngineDeaths,
    Failure,
    FailureKind,
    UpstreamError,
    failure_kind,
    known_poison,
)
from deployments.router.admission import Place
from deployments.router.live_state import VIEW, hints_of
from deployments.router.upstream.remote import EmptyAnswerError
from deployments.wire import AsleepReply, Hints, ReplyEnd, deployment_name

log = logging.getLogger("ray.serve")

# A router receives the desired residency about this long after the replicas.
RESIDENCY_LAG_S = 0.02
# One in thirty million log-normal times is later; no benchmark notices another number.
LATE_SPREADS = 5.5
MIN_FIRST_BYTE_S = 10.0  # cold caches and a busy machine are no failures


@dataclass(slots=True)
class Call:
    """One request on its way through an SLM; mutable, owned by one task."""

    decision: Decision
    state: SLMState  # of the chosen SLM at the decision
    load: tuple[float, ...]  # the predictor's load features of that state
    started: float = field(default_factory=time.perf_counter)
    sent: float = field(default_factory=time.perf_counter)  # to the SLM `slm_id`
    slm_id: str = ""
    retries: int = 0
    first_byte_s: float | None = None
    last_byte_s: float = 0.0  # when the last part came, since the start
    status: str = "error"
    http_status: int = 500
    failure: str = ""  # kind of what the client was told, and the text
    failure_text: str = ""
    failed_attempts: list[FailedAttempt] = field(default_factory=list)
    reply: Any = None  # of the SLM `slm_id`
    currency: str = ""  # of costs
    end: ReplyEnd | None = None  # last item of the SLM's reply
    predicted_replica: str = ""
    running_on: str = ""  # SLM whose running requests include it
    queued_for_wakeup: bool = False  # it waited for an SLM to wake up
    preferred_hot: bool | None = None  # None without a memory budget
    limit_s: float = 3600.0  # for all of it, from `started` on
    place: Place | None = None  # its place in this router
    # Orders the SLMs that the decision left without a score; called once, when all others failed.
    rank_unscored: Callable[[], Sequence[str]] = tuple

    @property
    def left_s(self) -> float:
        """Seconds that it may still take."""
        return max(self.limit_s - self.elapsed_s, 0.0)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self.started

    @property
    def took_s(self) -> float:
        """Seconds since it was sent to `slm_id`."""
        return time.perf_counter() - self.sent

    @property
    def fell_back(self) -> bool:
        """True when the request is at another SLM than the chosen one."""
        return self.slm_id not in ("", self.decision.slm_id)

    @property
    def reason(self) -> str:
        """Value of `x-calm-reason`."""
        if self.fell_back:
            return f"{DecisionPath.FALLBACK}:{DecisionReason.FAILOVER}"
        rule = f":{self.decision.rule}" if self.decision.rule else ""
        return f"{self.decision.path}:{self.decision.reason}{rule}"


class Dispatcher:
    """Sends calls to the SLMs. `retries` bounds the failovers of a request.

    What follows from a failure is in `calm_serve.upstreams.CONSEQUENCES`. The next attempt is
    chosen when it is made: the SLM that failed once more if it has another replica and a replica
    was to blame, else the best of the others by the decision's score that can take it now.
    """

    def __init__(
        self,
        send: Callable[[str, str, dict[str, Any], AnswerRequest, Hints], AsyncIterator[Any]],
        *,
        health: Health,
        retries: int,
        queue_wait_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        admit: Callable[[Call, str], Awaitable[int | None]] | None = None,
    ) -> None:
        """Create a dispatcher.

        Args:
            send: returns the reply of an SLM (`Upstream.call`).
            health: of the SLMs, which failures are reported to.
            retries: most failovers per request. An SLM that is full, or cannot take the request,
                was not tried and does not count.
            queue_wait_s: longest predicted wait for a slot of an SLM.
            clock: monotonic seconds.
            admit: waits until a call may be sent to an SLM, or raises AsleepError. Returns the
                revision of the desired residency that it followed, None without a memory budget.
        """
        self._send, self._health = send, health
        self._admit = admit
        self._retries, self._queue_wait_s = retries, queue_wait_s
        self._deaths = EngineDeaths(clock)

    async def open(
        self, call: Call, path: str, body: dict[str, Any], asked: AnswerRequest
    ) -> AsyncIterator[bytes]:
        """Return the answer as an iterator of bytes, after its first chunk came.

        Raises:
            CapacityError: every SLM that may answer has a full queue or is asleep for too long.
            UpstreamError: no SLM could answer; of several failures the last that is not "full".
        """
        hints = hints_of(call.decision)
        if call.decision.context.stream:
            hints["first_byte_limit_s"] = _first_byte_limit_s(call.decision)
        attempts = _Attempts(call, self._retries, self._health)
        deaths = self._deaths.count(path, body)
        if deaths >= POISON_DEATHS:
            raise known_poison()
        while (slm_id := attempts.next()) is not None:
            call.slm_id, call.retries = slm_id, attempts.failed
            call.sent, call.reply = time.perf_counter(), None
            hints["wait_limit_s"] = _wait_limit_s(call, self._queue_wait_s)
            hints["engine_deaths"] = deaths + attempts.deaths
            try:
                items, first = await self._first(call, path, body, asked, hints)
                return _Answer(call, items, first, lambda: self._deaths.add(path, body))
            except CapacityError as error:
                attempts.full(slm_id, error)
            except UpstreamError as error:
                if error.failure.died_beside == 0:
                    self._deaths.add(path, body)
                attempts.failure(slm_id, error)
            except Exception:  # of any type: one attempt's fault must not cost the others
                log.exception("sending a request to SLM %s failed", slm_id)
                failure = Failure(FailureKind.TRANSPORT, f"SLM {slm_id!r} could not be asked")
                attempts.failure(slm_id, UpstreamError(failure))
            finally:
                call.predicted_replica = VIEW.take_routed(call.decision.decision_id)
                hints = {**hints, "avoid": call.predicted_replica}
        final = attempts.error()
        if isinstance(final, EmptyAnswerError):
            return _Answer(call, _Nothing(), final.answer, lambda: None)
        raise final

    async def _first(
        self, call: Call, path: str, body: dict[str, Any], asked: AnswerRequest, hints: Hints
    ) -> tuple[AsyncIterator[Any], Any]:
        """Send the call once its SLM is awake; return the reply's items and the first item."""
        while True:
            if self._admit is not None and (revision := await self._admit(call, call.slm_id)):
                asked = replace(asked, residency_revision=revision)
            call.sent = time.perf_counter()
            call.reply = items = self._send(call.slm_id, path, body, asked, hints)
            first = await anext(items)
            if not isinstance(first, AsleepReply):
                return items, first
            # The replica received the order to sleep before this router did.
            call.queued_for_wakeup = True
            await asyncio.sleep(RESIDENCY_LAG_S)


def _first_byte_limit_s(decision: Decision) -> float:
    """Seconds after which a stream that has not begun is given to another replica.

    An engine that hangs passes its health checks, so only this finds out. The limit is generous,
    because what is late under load is not broken.
    """
    predicted = [c.prediction for c in decision.candidates if c.prediction is not None]
    slowest_s = max(
        (p.ttft_s * math.exp(LATE_SPREADS * p.ttft_spread) for p in predicted), default=0.0
    )
    return max(slowest_s, MIN_FIRST_BYTE_S)


def _wait_limit_s(call: Call, most_s: float) -> float:
    """Seconds that the call may wait for a slot of its SLM so that its answer is still of use.

    With a deadline, what the answer itself is predicted to take has to fit behind the wait.
    """
    slo = call.decision.context.slo
    limits_s = [most_s, call.left_s]
    if slo.ttft_ms is not None:
        limits_s.append(slo.ttft_ms / 1000.0 - call.elapsed_s)
    if slo.deadline_s is not None:
        found = (c.prediction for c in call.decision.candidates if c.slm_id == call.slm_id)
        prediction = next(found, None)
        answer_s = 0.0 if prediction is None else prediction.e2e_s - prediction.ttft_s
        limits_s.append(slo.deadline_s - call.elapsed_s - answer_s)
    return max(min(limits_s), 0.0)


class Health(Protocol):
    """What the dispatcher asks of the SLMs' health, and reports to it."""

    def can_take(self, slm_id: str) -> bool:
        """Whether the SLM is in the fleet, has a replica or may start one, and is not broken."""

    def has_replica(self, slm_id: str) -> bool:
        """Whether the SLM has a live replica now."""

    def attempt_failed(self, slm_id: str, took_s: float) -> None:
        """Count a failure that speaks against the SLM, `took_s` after the call was sent."""

    def cool_down(self, slm_id: str, seconds: float) -> None:
        """Send the SLM nothing for so long."""


# Failures of a replica, not of the SLM: another replica may do better.
_OF_A_REPLICA = (FailureKind.TRANSPORT, FailureKind.ENGINE_DIED, FailureKind.SERVER_ERROR)


class _Attempts:
    """The attempts of one request so far, and what comes next."""

    def __init__(self, call: Call, retries: int, health: Health) -> None:
        decision = call.decision
        self.failed = 0
        self.deaths = 0  # of engines that worked on it
        self._call = call
        self._pinned = decision.path is DecisionPath.PINNED
        self._rank_unscored: Callable[[], Sequence[str]] | None = call.rank_unscored
        self._order = [decision.slm_id] if self._pinned else list(decision.ranking)
        self._retries = min(retries, 1) if self._pinned else retries
        self._health = health
        self._again = ""  # the SLM of which another replica is tried
        self._asked: list[str] = []
        self._full: list[str] = []
        self._capacity: CapacityError | None = None
        self._last: tuple[str, UpstreamError] | None = None
        self._uncounted: tuple[str, float] | None = None
        self._final = False

    def next(self) -> str | None:
        """Return the SLM to ask; None when there is no other attempt."""
        if self._final or self.failed > self._retries:
            return None
        slm_id = self._candidate()
        if slm_id is not None and self._uncounted is not None:
            # The last failure of all is counted by the request's outcome instead.
            self._health.attempt_failed(*self._uncounted)
            self._uncounted = None
        return slm_id

    def _candidate(self) -> str | None:
        again, self._again = self._again, ""
        if again and self._health.has_replica(again):
            return again
        slm_id = self._next_untried()
        if slm_id is None and self._rank_unscored is not None:
            self._order += self._rank_unscored()
            self._rank_unscored = None
            slm_id = self._next_untried()
        return slm_id

    def _next_untried(self) -> str | None:
        for slm_id in self._order:
            if slm_id in self._asked:
                continue
            self._asked.append(slm_id)
            # A pinned one has no alternative, and says best why it cannot answer.
            if self._pinned or self._health.can_take(slm_id):
                return slm_id
        return None

    def full(self, slm_id: str, error: CapacityError) -> None:
        """Note that an SLM has no room, or does not wake in time."""
        log.info("SLM %s: %s", slm_id, error.message)
        self._full.append(slm_id)
        if self._capacity is None or error.retry_after_s < self._capacity.retry_after_s:
            self._capacity = error
        self._note(slm_id, failure_kind(error))

    def _note(self, slm_id: str, kind: str) -> None:
        money = cost_of(self._call.reply)
        amount = None if money is None else money.amount
        self._call.currency = self._call.currency or (money.currency if money else "")
        attempt = FailedAttempt(slm_id, kind, self._call.took_s, amount)
        self._call.failed_attempts.append(attempt)
        self._call.reply = None

    def failure(self, slm_id: str, error: UpstreamError) -> None:
        """Note a failed attempt, and what follows from it."""
        failure, took_s = error.failure, self._call.took_s
        self._note(slm_id, failure.kind)
        self.deaths += failure.died_beside is not None
        follows = failure.consequence
        level = logging.WARNING if follows.breaker else logging.INFO
        level = logging.ERROR if follows.alarm else level
        log.log(level, "SLM %s: %s: %s", slm_id, failure.kind, failure.message)
        if failure.cool_down_s is not None:
            self._health.cool_down(slm_id, failure.cool_down_s)
        if failure.kind in (FailureKind.FULL, FailureKind.RATE_LIMITED):
            self._full.append(slm_id)
        first_of_it = self._last is None or self._last[0] != slm_id
        if failure.kind in _OF_A_REPLICA and first_of_it:
            self._again = slm_id
        if follows.breaker:
            self.failed += 1
            self._uncounted = (slm_id, took_s)
        self._last = (slm_id, error)
        self._final = not follows.next_slm

    def error(self) -> CalmError:
        """Return the client's error when no SLM has answered."""
        if self._last is not None and (self._capacity is None or not self._is_full(self._last[1])):
            return self._last[1]
        if self._capacity is not None:
            if isinstance(self._capacity, AsleepError) or len(self._full) == 1:
                return self._capacity
            message = f"no SLM that may answer has room now: {', '.join(self._full)}"
            return CapacityError(message, retry_after_s=self._capacity.retry_after_s)
        return SLMUnavailableError(f"no SLM can take the request now: {', '.join(self._order)}")

    def _is_full(self, error: UpstreamError) -> bool:
        return error.failure.kind is FailureKind.FULL


class _Nothing:
    """A reply without items."""

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        raise StopAsyncIteration


class _Answer:
    """The bytes of an answer in order; `call` is updated as they come.

    `on_death` is called when an engine dies that worked on this answer alone.
    """

    def __init__(
        self, call: Call, items: AsyncIterator[Any], first: Any, on_death: Callable[[], None]
    ) -> None:
        self._call, self._on_death = call, on_death
        self._items = items
        self._next: Any = first

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        item, self._next = self._next, None
        if item is None:
            if self._call.end is not None:
                raise StopAsyncIteration
            try:
                item = await anext(self._items)
            except UpstreamError as error:
                if error.failure.died_beside == 0:
                    self._on_death()
                raise
        self._call.last_byte_s = self._call.elapsed_s
        if self._call.first_byte_s is None:
            self._call.first_byte_s = self._call.last_byte_s
        if isinstance(item, ReplyEnd):
            self._finish(item)
            return item.payload
        payload: bytes = item
        return payload

    def _finish(self, item: ReplyEnd) -> None:
        call = self._call
        call.end, call.status, call.http_status = item, "ok", 200
        VIEW.observe(deployment_name(call.slm_id), item.facts, call.decision.decision_id)


def cost_of(reply: object) -> Cost | None:
    """Return what a reply has cost so far; None when its SLM names no price or no usage."""
    cost: Cost | None = getattr(reply, "cost", None)
    return cost


def cancel(answer: object) -> None:
    """Cancel the SLM's reply if `answer` is a stream; do nothing otherwise."""
    cancel_items(getattr(answer, "_items", None))


def cancel_items(items: object) -> None:
    """Break the reply off if `items` is one; do nothing otherwise."""
    stop = getattr(items, "cancel", None)
    if stop is not None:
        stop()
