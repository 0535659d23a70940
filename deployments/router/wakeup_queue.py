"""A router's side of residency: it counts what is wanted, holds what cannot be sent, and tells.

Requests for an SLM that sleeps wait here, not in its replica, whose engine would wake for them
whatever the budget. Nothing here is on the way of a request whose SLM is hot but two dictionary
look-ups.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from calm_serve.config import Fleet, RouterOptions
from calm_serve.errors import AsleepError, KnowledgeError
from calm_serve.protocol.reports import DemandReply, DemandReport
from calm_serve.types import Decision
from deployments.router.dispatch import Call, cancel
from deployments.router.live_state import VIEW
from deployments.router.residency_view import ResidencyView
from deployments.wire import deployment_name

log = logging.getLogger("ray.serve")

BUSY_PERIOD_S = 0.25  # between two words while there is something to say
IDLE_PERIOD_S = 1.0
MAX_WANTED = 1024  # arrivals between two words; the oldest are forgotten
LONGEST_RETRY_S = 600.0
GRACE_S = 2.0  # for a client that was told to come again

Ask = Callable[[str, DemandReport], Awaitable[DemandReply]]


class WakeupQueue:
    """Demand of one router process. Single-threaded."""

    def __init__(self, tiers: ResidencyView, router: RouterOptions, router_id: str) -> None:
        self._timeout_s = router.request_timeout_s
        self._tiers, self._router_id = tiers, router_id
        self._wanted: deque[str] = deque(maxlen=MAX_WANTED)
        self._held: Counter[str] = Counter()
        self._expected: dict[str, float] = {}  # SLM -> until when refused clients may come again
        self._running: Counter[str] = Counter()
        self._hits = self._misses = 0
        self._urgent = asyncio.Event()

    def wanted(self, call: Call, *, hit: bool) -> None:
        """Count a decision: its preferred SLM was hot, or was not."""
        self._wanted.append(call.decision.preferred)
        self._hits += hit
        self._misses += not hit
        call.preferred_hot = hit

    async def admit(self, call: Call, slm_id: str) -> int | None:
        """Return when the SLM may be sent the request, with the orders' version if there are any.

        Raises AsleepError when that is too late.
        """
        if not self._tiers.active:
            return None
        if call.held or not self._tiers.is_ordered_hot(slm_id):
            await self._hold(call, slm_id)
        self.left(call)
        call.inside = slm_id
        self._running[slm_id] += 1
        return self._tiers.version

    def left(self, call: Call) -> None:
        """The call has nothing to do with its SLM any more."""
        if call.inside:
            self._running[call.inside] -= 1
            call.inside = ""

    async def run(self, ask: Ask, fleet: Callable[[], Fleet]) -> None:
        """Tell the knowledge actor, for ever; `ask` is KnowledgeClient.report_demand."""
        while True:
            await self._tiers.until_active()
            self._urgent.clear()
            said = self._say(fleet())
            try:
                reply = await ask(self._router_id, said)
                self._tiers.waits, self._tiers.summary = reply.waits, reply.summary
            except KnowledgeError as error:
                log.warning("residency: %s", error)
                self._take_back(said)
            period_s = BUSY_PERIOD_S if self._held or said.queued else IDLE_PERIOD_S
            await self._pause(period_s)

    async def _pause(self, period_s: float) -> None:
        """Wait, but not where somebody must be woken, and not long where there are arrivals."""
        ends = time.monotonic() + period_s
        while (left_s := ends - time.monotonic()) > 0.0:
            try:
                await asyncio.wait_for(self._urgent.wait(), min(left_s, BUSY_PERIOD_S))
                return
            except TimeoutError:
                if self._wanted:
                    return

    async def _hold(self, call: Call, slm_id: str) -> None:
        call.held = True
        left_s = self._limit_s(call.decision) - call.elapsed_s
        expected_s = self._tiers.waits.get(slm_id, 0.0)
        if expected_s > left_s:
            if expected_s < LONGEST_RETRY_S:
                # Told to come again, so it is woken as if somebody waited.
                self._expected[slm_id] = time.monotonic() + expected_s + GRACE_S
                self._urgent.set()
            raise self._too_late(slm_id)
        self._held[slm_id] += 1
        if self._held[slm_id] == 1:
            self._urgent.set()
        try:
            async with asyncio.timeout(left_s):
                await self._tiers.until_ordered_hot(slm_id)
        except TimeoutError:
            raise self._too_late(slm_id) from None
        finally:
            self._held[slm_id] -= 1
            if not self._held[slm_id]:
                del self._held[slm_id]

    def _limit_s(self, decision: Decision) -> float:
        longest_s = min(self._tiers.options.hold_s, self._timeout_s)
        deadline_s = decision.context.slo.deadline_s
        return min(longest_s, deadline_s) if deadline_s else longest_s

    def _too_late(self, slm_id: str) -> AsleepError:
        wait_s = min(max(self._tiers.waits.get(slm_id, 1.0), 1.0), LONGEST_RETRY_S)
        return AsleepError(
            f"SLM {slm_id!r} is asleep and not awake in time; about {wait_s:.0f} s from now",
            retry_after_s=wait_s,
        )

    def _say(self, fleet: Fleet) -> DemandReport:
        now = time.monotonic()
        self._expected = {i: t for i, t in self._expected.items() if t > now}
        said = DemandReport(
            wanted=tuple(self._wanted),
            queued={**dict.fromkeys(self._expected, 1), **self._held},
            running={i: n for i, n in self._running.items() if n > 0},
            replicas={
                s.id: {r.replica_id: r.node_id for r in VIEW.replicas(deployment_name(s.id))}
                for s in fleet.slms
            },
            hits=self._hits,
            misses=self._misses,
        )
        self._wanted.clear()
        self._hits = self._misses = 0
        return said

    def _take_back(self, said: DemandReport) -> None:
        self._wanted.extendleft(reversed(said.wanted))
        self._hits += said.hits
        self._misses += said.misses


QUIET_S = 1.0  # a stream waits this long before its headers go out without an answer
PERIOD_S = 1.0
COMMENT = b": waking\n\n"  # server-sent events: lines that begin with a colon are ignored

T = TypeVar("T")


async def within(opening: Awaitable[T], quiet_s: float) -> asyncio.Future[T]:
    """Start `opening`, wait for it for `quiet_s` and return it, done or not.

    Cancelled together with the caller.
    """
    task = asyncio.ensure_future(opening)
    try:
        await asyncio.wait({task}, timeout=quiet_s)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task


def abandoned_with(stream: AsyncIterator[T], opening: asyncio.Future[Any]) -> AsyncIterator[T]:
    """The stream; `opening` is cancelled with it, should nobody ever begin to read."""
    weakref.finalize(stream, give_up, opening).atexit = False
    return stream


def give_up(opening: asyncio.Future[Any]) -> None:
    """Stop an opening, or the answer that came of it and that nobody will read."""
    if not opening.cancel() and not opening.cancelled() and opening.exception() is None:
        cancel(opening.result())


async def comments(opening: asyncio.Future[T], period_s: float) -> AsyncIterator[bytes]:
    """A comment now and in each period, until `opening` is done."""
    while not opening.done():
        yield COMMENT
        await asyncio.wait({opening}, timeout=period_s)
