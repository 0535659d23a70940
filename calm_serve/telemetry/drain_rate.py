"""Drain rate: how fast the slots of a service get free, and how long a request waits for one."""

from __future__ import annotations

import math
from collections.abc import Callable

from calm_serve.telemetry.statistics import decay

HALF_LIFE_S = 30.0  # as of the SLMs' statistics: long against one answer
MIN_RETRY_AFTER_S = 0.5  # a new connection and a decision cost more than a shorter wait saves
MAX_RETRY_AFTER_S = 30.0  # SDKs ignore more than a minute, and load seldom lasts so long
JITTER_RATIO = 0.5  # clients that were refused together come back spread over half of their wait


class DrainRate:
    """Slots of one service that this process holds, and how fast they get free.

    The rate is that of one held slot, answers per slot-second, times the slots held now. It needs
    no time of full load to be known, and it falls while slots are held and none gets free, as in a
    service that hangs. One answer of `prior_hold_s` counts as seen before.
    """

    __slots__ = ("_at", "_freed", "_held_s", "_next_at", "_prior_hold_s", "held")

    def __init__(self, prior_hold_s: float, now: float) -> None:
        """Start at `now` (monotonic seconds) with the expected seconds of one answer."""
        self.held = 0
        self._prior_hold_s = max(prior_hold_s, 1e-3)
        self._freed = self._held_s = 0.0  # decayed: slots that got free, slot-seconds
        self._at = now
        self._next_at = -math.inf  # when the last refused request was told to come back

    def take(self, now: float) -> None:
        """Count a slot as held."""
        self._advance(now)
        self.held += 1

    def give_back(self, now: float, *, answered: bool = True) -> None:
        """Count a slot as free. `answered`: False for a request that was refused at once."""
        self._advance(now)
        self.held = max(self.held - 1, 0)
        self._freed += answered

    def per_s(self, now: float) -> float:
        """Return the slots that get free in a second; those of one slot when none is held."""
        self._advance(now)
        per_slot_s = (self._freed + 1.0) / (self._held_s + self._prior_hold_s)
        return per_slot_s * max(self.held, 1)

    def wait_s(self, ahead: int, now: float) -> float:
        """Return the predicted seconds until a request with `ahead` before it gets a slot."""
        return (ahead + 1) / self.per_s(now)

    def retry_after_s(self, after_s: float, now: float, random: Callable[[], float]) -> float:
        """Return the seconds after which a refused client should come back.

        Refused clients are told times that follow each other at the drain rate, the first one
        `after_s` from now, each with a jitter from `random` (in [0, 1)).
        """
        latest = now + MAX_RETRY_AFTER_S
        begin = max(self._next_at, now + after_s)
        self._next_at = min(begin + 1.0 / self.per_s(now), latest)
        wait_s = max(self._next_at - now, MIN_RETRY_AFTER_S)
        return wait_s * (1.0 + JITTER_RATIO * random())

    def _advance(self, now: float) -> None:
        passed_s = now - self._at
        if passed_s <= 0.0:
            return
        kept = decay(passed_s, HALF_LIFE_S)
        self._freed *= kept
        self._held_s *= kept
        self._held_s += self.held * (1.0 - kept) * HALF_LIFE_S / math.log(2.0)
        self._at = now
