"""Requests that wait for a slot of an SLM, and the slots that this router's requests hold."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from bisect import insort
from collections.abc import Callable

from calm_serve.errors import CapacityError
from calm_serve.telemetry import DrainRate

# A prediction is seldom wrong by more (decision 0046), and a request that has waited for long is
# dear to refuse.
PATIENCE_RATIO = 2.0
SLOT_POLL_S = 0.05  # between two attempts of the first in a queue


class Position:
    """One request's position in a queue; it keeps it while it tries to get a slot."""

    __slots__ = ("awake", "has_turn", "number", "until_s")

    def __init__(self, number: int, until_s: float) -> None:
        self.number, self.until_s = number, until_s
        self.has_turn = False
        self.awake = asyncio.Event()

    def __lt__(self, other: Position) -> bool:
        return self.number < other.number


class SlotQueue:
    """Requests of one SLM that wait because all its replicas are full, first come first served.

    It is bounded by count and by predicted wait: a request whose turn would come too late is
    refused at once, with the time after which it should be sent again.

    Args:
        slm_id: for messages.
        max_waiting: requests that may wait.
        prior_hold_s: expected seconds of one answer, until answers are seen.
        clock: monotonic seconds.
        random: numbers in [0, 1), for the jitter of `Retry-After`.
    """

    def __init__(
        self,
        slm_id: str,
        max_waiting: int,
        prior_hold_s: float,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._slm_id, self._max_waiting = slm_id, max_waiting
        self._clock, self._random = clock, random
        self._drain = DrainRate(prior_hold_s, clock())
        self._waiting: list[Position] = []  # in order
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def held(self) -> int:
        """Requests of this router that are in the SLM."""
        return self._drain.held

    def take(self) -> None:
        """Count a request that is sent to the SLM."""
        self._drain.take(self._clock())

    def give_back(self, *, answered: bool) -> None:
        """Count a request that is over; `answered`: the SLM took it."""
        self._drain.give_back(self._clock(), answered=answered)

    def full(self, message: str) -> CapacityError:
        """Return the error for a request that is not to wait, with its time to come back."""
        now_s = self._clock()
        after_s = self._drain.wait_s(0, now_s)
        retry_after_s = self._drain.retry_after_s(after_s, now_s, self._random)
        return CapacityError(f"SLM {self._slm_id!r} {message}", retry_after_s=retry_after_s)

    def enter(self, limit_s: float) -> Position:
        """Return a position for a request that may wait for `limit_s`.

        Raises CapacityError when too many wait already, or its turn would come too late.
        """
        now_s = self._clock()
        ahead = len(self._waiting)
        wait_s = self._drain.wait_s(ahead, now_s)
        if ahead < self._max_waiting and wait_s <= limit_s:
            return Position(next(self._numbers), now_s + PATIENCE_RATIO * limit_s)
        # When what waits too long has drained; when half of a full queue has.
        after_s = wait_s - limit_s if wait_s > limit_s else wait_s / 2.0
        message = f"SLM {self._slm_id!r} is at its queue limit: {ahead} wait, about {wait_s:.1f} s"
        raise CapacityError(
            message, retry_after_s=self._drain.retry_after_s(after_s, now_s, self._random)
        )

    async def wait(self, position: Position) -> None:
        """Wait until it is this request's turn to try (again).

        A slot that another router's request frees is not seen here, so the first one tries again
        every SLOT_POLL_S. Raises CapacityError when its time in the queue is over.
        """
        insort(self._waiting, position)
        try:
            while not position.has_turn:
                if await self._is_due(position):
                    break
        except BaseException:  # a cancellation too: the turn that it has just got is not lost
            if position.has_turn:
                self.next()
            raise
        finally:
            position.has_turn = False
            self._leave(position)

    def next(self) -> None:
        """Give the first one its turn."""
        if self._waiting:
            first = self._waiting.pop(0)
            first.has_turn = True
            first.awake.set()
            self._wake_first()

    async def _is_due(self, position: Position) -> bool:
        """Sleep; return whether it is time for the first one to try by itself."""
        left_s = position.until_s - self._clock()
        if left_s <= 0.0:
            raise self.full("has had no free slot in time")
        was_first = self._waiting[0] is position
        position.awake.clear()
        try:
            async with asyncio.timeout(min(left_s, SLOT_POLL_S) if was_first else left_s):
                await position.awake.wait()
        except TimeoutError:
            return was_first and position.until_s > self._clock()
        return False

    def _leave(self, position: Position) -> None:
        with contextlib.suppress(ValueError):
            self._waiting.remove(position)
        self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].awake.set()
