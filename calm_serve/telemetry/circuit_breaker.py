"""Circuit breaker of one SLM: stops requests where they fail, then admits single probes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from calm_serve.telemetry.statistics import Ewma


class BreakerState(StrEnum):
    """Closed lets requests through, open blocks them, half-open lets one through at a time."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When to open, and for how long; tests/unit/telemetry notices `consecutive`."""

    consecutive: int = 5  # failures in a row
    failure_ratio: float = 0.5  # of the recent requests ...
    min_requests: float = 10.0  # ... once that many are recent
    half_life_s: float = 30.0  # what "recent" means
    cool_down_s: float = 5.0  # after the first opening; doubles while probes keep failing
    max_cool_down_s: float = 60.0


class CircuitBreaker:
    """Opens on consecutive failures or on the recent failure ratio; closes on one good probe.

    A probe is a request that was sent after the opening. Answers to requests sent before the
    opening are ignored: they may show a state that is over.
    """

    __slots__ = ("_cool_down_s", "_limits", "_opened_at", "_ratio", "_since", "consecutive")

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._opened_at: float | None = None
        self._since = -math.inf  # requests sent before this do not count
        self._cool_down_s = limits.cool_down_s
        self._ratio = Ewma(limits.half_life_s)
        self.consecutive = 0

    @property
    def failure_ratio(self) -> float:
        """Recent share of failures in [0, 1], counted since the breaker last closed."""
        return self._ratio.mean or 0.0

    def state(self, now: float) -> BreakerState:
        """Return the state at `now` (seconds)."""
        if self._opened_at is None:
            return BreakerState.CLOSED
        if now < self._opened_at + self._cool_down_s:
            return BreakerState.OPEN
        return BreakerState.HALF_OPEN

    def blocks(self, now: float, in_flight: int) -> bool:
        """True when no further request may be sent; `in_flight` are the caller's own requests.

        Half-open admits one probe at a time. The result of a probe may never arrive. So that this
        does not block the SLM for ever, requests in flight no longer count after one more
        cool-down.
        """
        state = self.state(now)
        if state is not BreakerState.HALF_OPEN or self._opened_at is None:
            return state is BreakerState.OPEN
        return in_flight > 0 and now < self._opened_at + 2.0 * self._cool_down_s

    def record(self, failed: bool, now: float, sent_at: float) -> None:
        """Count one request that has ended; one sent before the opening changes nothing."""
        state = self.state(now)
        if state is BreakerState.OPEN or sent_at < self._since:
            return
        if state is BreakerState.HALF_OPEN:
            if failed:
                self._open(now)
                self._cool_down_s = min(2.0 * self._cool_down_s, self._limits.max_cool_down_s)
            else:
                self._close()
            return
        self.consecutive = self.consecutive + 1 if failed else 0
        self._ratio.add(float(failed), now)
        if failed and self._tripped(now):
            self._open(now)

    def restart(self, now: float) -> None:
        """Close, and ignore requests sent before `now`: other replicas answer from now on."""
        self._close()
        self._since = now

    def _tripped(self, now: float) -> bool:
        if self.consecutive >= self._limits.consecutive:
            return True
        enough = self._ratio.weight(now) >= self._limits.min_requests
        return enough and self.failure_ratio >= self._limits.failure_ratio

    def _open(self, now: float) -> None:
        self._opened_at = self._since = now

    def _close(self) -> None:
        self._opened_at = None
        self._cool_down_s = self._limits.cool_down_s
        self._ratio = Ewma(self._limits.half_life_s)
        self.consecutive = 0
