"""Router side of residency: reports demand, and queues requests whose SLM is asleep.

`WakeupQueue` keeps requests for a sleeping SLM in the router, because a replica that received one
would wake without regard to the memory budget. The functions below it keep a queued stream alive:
its client gets a comment every KEEPALIVE_PERIOD_S until the SLM is awake. A request whose SLM is
hot costs two dictionary look-ups.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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

BUSY_PERIOD_S = 0.25  # between two reports while there are arrivals or queued requests
IDLE_PERIOD_S = 1.0
MAX_ARRIVALS = 1024  # kept between two reports; the oldest are dropped
MAX_RETRY_AFTER_S = 600.0
RETRY_GRACE_S = 2.0  # demand of a client that was sent away counts so long beyond its Retry-After

KEEPALIVE_AFTER_S = 1.0  # after this long, a stream's headers are sent before its SLM answers
KEEPALIVE_PERIOD_S = 1.0
KEEPALIVE = b": waking\n\n"  # server-sent events: clients ignore lines that begin with a colon

ReportDemand = Callable[[str, DemandReport], Awaitable[DemandReply]]
T = TypeVar("T")


class WakeupQueue:
    """Demand and queued requests of one router process. Single-threaded."""

    def __init__(self, view: ResidencyView, router: RouterOptions, router_id: str) -> None:
        self._request_timeout_s = router.request_timeout_s
        self._most_waiting = int(router.max_ongoing_requests * router.max_wakeup_ratio)
        self._waiting = 0  # for a wake-up or for a replica's start
        self._view, self._router_id = view, router_id
        self._arrivals: deque[str] = deque(maxlen=MAX_ARRIVALS)
        self._queued: Counter[str] = Counter()
        self._retry_until: dict[str, float] = {}  # SLM -> until when clients may retry
        self._running: Counter[str] = Counter()
        self._hits = self._misses = 0
        self._report_now = asyncio.Event()

    def count_demand(self, call: Call, *, hit: bool) -> None:
        """Count a decision; `hit` says whether its preferred SLM was hot."""
        self._arrivals.append(call.decision.preferred)
        self._hits += hit
        self._misses += not hit
        call.preferred_hot = hit

    async def admit(self, call: Call, slm_id: str) -> int | None:
        """Wait until the call may be sent to the SLM; return the revision of desired residency.

        The revision is None without a memory budget. Raises AsleepError when the SLM will not be
        awake in time.
        """
        if not self._view.active:
            return None
        if call.queued_for_wakeup or not self._view.is_desired_hot(slm_id):
            await self._wait_until_hot(call, slm_id)
        self.release(call)
        call.running_on = slm_id
        self._running[slm_id] += 1
        return self._view.revision

    @contextlib.contextmanager
    def place(self, slm_id: str) -> Iterator[None]:
        """Count a request that waits for a wake-up, or for a replica to start.

        Such requests hold places of the router that requests for other SLMs need, so only a part of
        the places is for them. Raises AsleepError beyond it.
        """
        if self._waiting >= self._most_waiting:
            raise self._too_late(slm_id)
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def release(self, call: Call) -> None:
        """Stop counting the call as running on its SLM; a repeated call has no effect."""
        if call.running_on:
            self._running[call.running_on] -= 1
            call.running_on = ""

    async def run(self, report: ReportDemand, fleet: Callable[[], Fleet]) -> None:
        """Call `report` (`KnowledgeClient.report_demand`) for ever; at once when a queue forms."""
        while True:
            await self._view.until_active()
            self._report_now.clear()
            demand = self._take_demand(fleet())
            try:
                reply = await report(self._router_id, demand)
                self._view.wait_s, self._view.summary = reply.waits, reply.summary
            except KnowledgeError as error:
                log.warning("residency: %s", error)
                self._put_back(demand)
            period_s = BUSY_PERIOD_S if self._queued or demand.queued else IDLE_PERIOD_S
            await self._pause(period_s)

    async def _pause(self, period_s: float) -> None:
        """Wait; end at once when an SLM has to be woken, and early when there are arrivals."""
        ends = time.monotonic() + period_s
        while (left_s := ends - time.monotonic()) > 0.0:
            try:
                async with asyncio.timeout(min(left_s, BUSY_PERIOD_S)):
                    await self._report_now.wait()
                return
            except TimeoutError:
                if self._arrivals:
                    return

    async def _wait_until_hot(self, call: Call, slm_id: str) -> None:
        call.queued_for_wakeup = True
        left_s = self._longest_wait_s(call.decision) - call.elapsed_s
        expected_s = self._view.wait_s.get(slm_id, 0.0)
        if expected_s > left_s or self._waiting >= self._most_waiting:
            if expected_s < MAX_RETRY_AFTER_S:
                # The client gets Retry-After, so the SLM is woken as for a queued request.
                self._retry_until[slm_id] = time.monotonic() + expected_s + RETRY_GRACE_S
                self._report_now.set()
            raise self._too_late(slm_id)
        self._queued[slm_id] += 1
        if self._queued[slm_id] == 1:
            self._report_now.set()
        try:
            with self.place(slm_id):
                async with asyncio.timeout(left_s):
                    await self._view.until_desired_hot(slm_id)
        except TimeoutError:
            raise self._too_late(slm_id) from None
        finally:
            self._queued[slm_id] -= 1
            if not self._queued[slm_id]:
                del self._queued[slm_id]

    def _longest_wait_s(self, decision: Decision) -> float:
        longest_s = min(self._view.options.hold_s, self._request_timeout_s)
        deadline_s = decision.context.slo.deadline_s
        return min(longest_s, deadline_s) if deadline_s else longest_s

    def _too_late(self, slm_id: str) -> AsleepError:
        wait_s = min(max(self._view.wait_s.get(slm_id, 1.0), 1.0), MAX_RETRY_AFTER_S)
        why = f"cannot wake in time; it needs about {wait_s:.0f} s"
        if self._waiting >= self._most_waiting:
            why = f"{self._waiting} requests wait for SLMs to wake, as many as may"
        return AsleepError(f"SLM {slm_id!r} is asleep: {why}", retry_after_s=wait_s)

    def _take_demand(self, fleet: Fleet) -> DemandReport:
        """The report of demand since the last one."""
        now = time.monotonic()
        self._retry_until = {i: t for i, t in self._retry_until.items() if t > now}
        demand = DemandReport(
            arrivals=tuple(self._arrivals),
            queued={**dict.fromkeys(self._retry_until, 1), **self._queued},
            running={i: n for i, n in self._running.items() if n > 0},
            replicas={
                s.id: {r.replica_id: r.node_id for r in VIEW.replicas(deployment_name(s.id))}
                for s in fleet.slms
            },
            hits=self._hits,
            misses=self._misses,
        )
        self._arrivals.clear()
        self._hits = self._misses = 0
        return demand

    def _put_back(self, demand: DemandReport) -> None:
        """Add the demand of a report that was not received to the next report."""
        self._arrivals.extendleft(reversed(demand.arrivals))
        self._hits += demand.hits
        self._misses += demand.misses


async def wait_briefly(opening: Awaitable[T], limit_s: float) -> asyncio.Future[T]:
    """Start `opening`, wait for it for `limit_s` seconds and return it, done or not.

    Cancelled together with the caller.
    """
    task = asyncio.ensure_future(opening)
    try:
        await asyncio.wait({task}, timeout=limit_s)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task


def cancel_with(stream: AsyncIterator[T], opening: asyncio.Future[Any]) -> AsyncIterator[T]:
    """The stream; `opening` is cancelled when it is garbage-collected, even if never read."""
    weakref.finalize(stream, discard, opening).atexit = False
    return stream


def discard(opening: asyncio.Future[Any]) -> None:
    """Cancel an opening, or the answer that it has opened already."""
    if not opening.cancel() and not opening.cancelled() and opening.exception() is None:
        cancel(opening.result())


async def keepalives(opening: asyncio.Future[T], period_s: float) -> AsyncIterator[bytes]:
    """A comment now and in each period, until `opening` is done."""
    while not opening.done():
        yield KEEPALIVE
        await asyncio.wait({opening}, timeout=period_s)
