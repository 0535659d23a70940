"""Dispatch: calls the chosen SLM and fails over to the next one until the first byte came.

After the first byte nothing is retried, because the client has it. Every call ends in exactly one
outcome, also when the client disconnects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from calm_serve.errors import AsleepError, CalmError, CapacityError, SLMUnavailableError
from calm_serve.protocol.answers import AnswerRequest
from calm_serve.types import (
    Decision,
    DecisionPath,
    DecisionReason,
    SLMState,
)
from deployments.router.live_state import VIEW, hints_of
from deployments.wire import ErrorReply, Hints, ReplyEnd, deployment_name

log = logging.getLogger("ray.serve")

RETRY_AFTER_S = 1.0
# A router receives the desired residency about this long after the replicas.
RESIDENCY_LAG_S = 0.02


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
    status: str = "error"
    http_status: int = 500
    end: ReplyEnd | None = None  # last item of the SLM's reply
    predicted_replica: str = ""
    running_on: str = ""  # SLM whose running requests include it
    queued_for_wakeup: bool = False  # it waited for an SLM to wake up
    preferred_hot: bool | None = None  # None without a memory budget

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
    """Sends calls to the SLMs. `retries` bounds the failovers of a request."""

    def __init__(
        self,
        send: Callable[[str, str, dict[str, Any], AnswerRequest, Hints], AsyncIterator[Any]],
        *,
        in_fleet: Callable[[str], bool],
        retries: int,
        attempt_failed: Callable[[str, float], None],
        admit: Callable[[Call, str], Awaitable[int | None]] | None = None,
    ) -> None:
        """Create a dispatcher.

        Args:
            send: returns the reply of an SLM (`Upstream.call`).
            in_fleet: whether an SLM is still in the fleet.
            retries: most failovers per request.
            attempt_failed: called with the SLM and the seconds since the call was sent to it.
            admit: waits until a call may be sent to an SLM, or raises AsleepError. Returns the
                revision of the desired residency that it followed, None without a memory budget.
        """
        self._send, self._in_fleet = send, in_fleet
        self._admit = admit
        self._retries = retries
        self._attempt_failed = attempt_failed

    async def open(
        self, call: Call, path: str, body: dict[str, Any], asked: AnswerRequest
    ) -> AsyncIterator[bytes] | ErrorReply:
        """Return the answer as an iterator of bytes, after its first chunk came, or an error reply.

        Raises:
            CapacityError: every SLM of the plan has a full queue or is asleep for too long.
            SLMUnavailableError: no SLM of the plan answered.
        """
        hints = hints_of(call.decision)
        plan = self._plan(call.decision)
        full: list[str] = []
        late: AsleepError | None = None
        for position, slm_id in enumerate(plan):
            # A queue that was full is not shorter a moment later.
            if slm_id in full or not self._may_answer(slm_id, again=slm_id in plan[:position]):
                continue
            call.slm_id, call.retries = slm_id, position
            try:
                items, first = await self._first(call, path, body, asked, hints)
            except AsleepError as error:
                late = late or error
                full.append(slm_id)
                continue
            except CapacityError:
                full.append(slm_id)
                continue
            # A dead replica, an exception in it, a deleted application, of any type: a fault of
            # one attempt must not cost the client the others.
            except Exception as error:  # noqa: BLE001
                log.warning("SLM %s failed before its first byte: %r", slm_id, error)
                self._attempt_failed(slm_id, call.took_s)
                continue
            finally:
                call.predicted_replica = VIEW.take_routed(call.decision.decision_id)
                hints = {**hints, "avoid": call.predicted_replica}
            if isinstance(first, ErrorReply):
                _forget_dead_replica(slm_id, first)
                if first.http_status >= 500:
                    self._attempt_failed(slm_id, call.took_s)
                    if position + 1 < len(plan):
                        continue
                return first
            return _Answer(call, items, first)
        raise late or _no_answer(plan, full)

    async def _first(
        self, call: Call, path: str, body: dict[str, Any], asked: AnswerRequest, hints: Hints
    ) -> tuple[AsyncIterator[Any], Any]:
        """Send the call once its SLM is awake; return the reply's items and the first item."""
        while True:
            if self._admit is not None and (revision := await self._admit(call, call.slm_id)):
                asked = replace(asked, residency_revision=revision)
            call.sent = time.perf_counter()
            items = self._send(call.slm_id, path, body, asked, hints)
            first = await anext(items)
            if not isinstance(first, ErrorReply) or not first.asleep:
                return items, first
            # The replica received the order to sleep before this router did.
            call.queued_for_wakeup = True
            await asyncio.sleep(RESIDENCY_LAG_S)

    def _may_answer(self, slm_id: str, *, again: bool) -> bool:
        if not self._in_fleet(slm_id):
            return False  # it has left since the decision
        return not again or bool(VIEW.replicas(deployment_name(slm_id)))

    def _plan(self, decision: Decision) -> list[str]:
        """SLMs to try in order: the chosen one twice (another replica), then the next best."""
        if decision.path is DecisionPath.PINNED:
            return [decision.slm_id] * (1 + min(self._retries, 1))
        order = [decision.slm_id, decision.slm_id, *decision.ranking[1:]]
        return order[: 1 + self._retries]


class _Answer:
    """The bytes of an answer in order; `call` is updated as they come."""

    def __init__(self, call: Call, items: AsyncIterator[Any], first: Any) -> None:
        self._call = call
        self._items = items
        self._next: Any = first

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        item, self._next = self._next, None
        if item is None:
            if self._call.end is not None:
                raise StopAsyncIteration
            item = await anext(self._items)
        if self._call.first_byte_s is None:
            self._call.first_byte_s = time.perf_counter() - self._call.started
        if isinstance(item, ReplyEnd):
            self._finish(item)
            return item.payload
        if isinstance(item, ErrorReply):
            _forget_dead_replica(self._call.slm_id, item)
            raise SLMUnavailableError(f"SLM {self._call.slm_id!r} failed while answering")
        payload: bytes = item
        return payload

    def _finish(self, item: ReplyEnd) -> None:
        call = self._call
        call.end, call.status, call.http_status = item, "ok", 200
        VIEW.observe(deployment_name(call.slm_id), item.facts)


def _no_answer(plan: list[str], full: list[str]) -> CalmError:
    """The error when no SLM of `plan` answered; the queues of those in `full` were full."""
    if not full:
        return SLMUnavailableError(f"no replica answered: tried {', '.join(plan)}")
    message = f"every SLM that may answer is at its queue limit: {', '.join(full)}"
    return CapacityError(message, retry_after_s=RETRY_AFTER_S)


def _forget_dead_replica(slm_id: str, reply: ErrorReply) -> None:
    if reply.dead_replica:
        VIEW.died(deployment_name(slm_id), reply.dead_replica)


def cancel(answer: object) -> None:
    """Cancel the SLM's reply if `answer` is a stream; do nothing otherwise."""
    cancel_items(getattr(answer, "_items", None))


def cancel_items(items: object) -> None:
    """Break the reply off if `items` is one; do nothing otherwise."""
    stop = getattr(items, "cancel", None)
    if stop is not None:
        stop()
