"""Other residency policies to compare with.

LRU is the CALM paper's (arXiv 2602.03632), LFU its usual rival, `static` never moves anything.
They keep the budget and the pins, and have no guards, no forecast and no prefetch.
"""

from __future__ import annotations

import math

from calm_serve.config import ResidencyOptions
from calm_serve.residency.planner import Planner
from calm_serve.residency.records import ModelFootprint


class LeastRecentlyUsed(Planner):
    """Whoever was wanted longest ago goes first."""

    def __init__(self, options: ResidencyOptions) -> None:
        super().__init__(options)
        self._arrival = 0
        self._last: dict[str, int] = {}

    def _observe(self, slm_id: str, now: float) -> None:
        self._arrival += 1
        self._last[slm_id] = self._arrival

    def _worth(self, occupant: ModelFootprint, now: float) -> float:
        return self._last.get(occupant.slm_id, 0)


class LeastFrequentlyUsed(Planner):
    """Whoever was wanted least often goes first."""

    def __init__(self, options: ResidencyOptions) -> None:
        super().__init__(options)
        self._counts: dict[str, int] = {}

    def _observe(self, slm_id: str, now: float) -> None:
        self._counts[slm_id] = self._counts.get(slm_id, 0) + 1

    def _worth(self, occupant: ModelFootprint, now: float) -> float:
        return self._counts.get(occupant.slm_id, 0)


class Static(Planner):
    """The pinned SLMs and the first others that fit stay; nobody else is ever woken."""

    def _worth(self, occupant: ModelFootprint, now: float) -> float:
        return 0.0

    def _free_at(self, occupant: ModelFootprint, now: float) -> float:
        return math.inf
