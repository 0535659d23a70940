"""Alarms: raised by detectors, ended by them or by time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from calm_serve.protocol.topics import Alarm

# A detected change is an event, not a state, so its alarm stays on for this long to be seen.
LIFETIME_S = 600.0
MAX_ALARMS = 64  # bound of memory


class Alarms:
    """At most MAX_ALARMS alarms, one per kind, SLM and replica. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float], lifetime_s: float = LIFETIME_S) -> None:
        self._clock, self._lifetime_s = clock, lifetime_s
        self._on: dict[tuple[str, str, str], tuple[Alarm, float]] = {}

    def start(
        self, kind: str, slm: str, size: float, detail: str = "", replica: str = ""
    ) -> Alarm | None:
        """Raise or renew an alarm; return it when it was off before, else None."""
        now, key = self._clock(), (kind, slm, replica)
        self._expire(now)
        known = self._on.pop(key, None)
        alarm = Alarm(kind, slm, round(size, 3), now, detail, replica)
        if known is not None:
            alarm = replace(alarm, since=known[0].since)
        self._on[key] = alarm, now + self._lifetime_s
        if len(self._on) > MAX_ALARMS:
            del self._on[next(iter(self._on))]
        return alarm if known is None else None

    def end(self, kind: str, slm: str = "", replica: str = "") -> None:
        """End an alarm; nothing happens when it is off."""
        self._on.pop((kind, slm, replica), None)

    def current(self) -> tuple[Alarm, ...]:
        """The alarms that are on, the oldest first."""
        self._expire(self._clock())
        return tuple(a for a, _ in sorted(self._on.values(), key=lambda found: found[0].since))

    def _expire(self, now: float) -> None:
        for key in [k for k, (_, until) in self._on.items() if until <= now]:
            del self._on[key]
