"""Admission: how many requests for SLMs one router works on at once.

Only requests for SLMs pass here. Health, metrics and administration do not, so they answer while
generation is saturated; for that, Serve's own bound on the router is ADMINISTRATION_SLOTS higher.
"""

from __future__ import annotations

from collections.abc import Callable

from calm_serve.errors import RouterFullError
from calm_serve.telemetry import DrainRate

# Requests for health, metrics and administration, and requests that are being refused: they take
# milliseconds, so 64 at once are thousands in a second.
ADMINISTRATION_SLOTS = 64
PRIOR_ANSWER_S = 1.0  # of one answer, until some are seen


class Place:
    """A request's place in the router, given back once: by `release`, or when it is dropped."""

    __slots__ = ("_release",)

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the place back; a repeated call has no effect."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        # A client may disconnect while its body is read.
        self.release()


class Admission:
    """Places for requests of one router process. Single-threaded.

    Args:
        limit: requests in work at once.
        clock: monotonic seconds.
        random: numbers in [0, 1), for the jitter of `Retry-After`.
    """

    def __init__(self, limit: int, clock: Callable[[], float], random: Callable[[], float]) -> None:
        self._limit, self._clock, self._random = limit, clock, random
        self._drain = DrainRate(PRIOR_ANSWER_S, clock())

    @property
    def in_work(self) -> int:
        """Requests that have a place."""
        return self._drain.held

    def enter(self) -> Place:
        """Return a place for one more request. Raises RouterFullError (429) when there is none."""
        now_s = self._clock()
        if self._drain.held >= self._limit:
            after_s = self._drain.wait_s(0, now_s)
            raise RouterFullError(
                f"this router works on {self._limit} requests, as many as it may",
                retry_after_s=self._drain.retry_after_s(after_s, now_s, self._random),
            )
        self._drain.take(now_s)
        return Place(self._leave)

    def _leave(self) -> None:
        self._drain.give_back(self._clock())
