"""Residency policies by name: `calm`, which is the forecast planner, and its baselines.

LRU is the CALM paper's policy (arXiv 2602.03632), LFU the usual alternative, `static` never changes
anything. They keep the budget and the pins, and have no guards, no forecast and no prefetch.
"""

from __future__ import annotations

import math

from calm_serve.config import ResidencyOptions, ResidencyPolicyName
from calm_serve.residency.planner import ForecastPlanner, Planner
from calm_serve.residency.records import ModelFootprint


class LeastRecentlyUsed(Planner):
    """Evicts the SLM whose last request is the oldest."""

    def __init__(self, options: ResidencyOptions) -> None:
        super().__init__(options)
        self._arrivals = 0
        self._last_arrival: dict[str, int] = {}

    def _on_arrival(self, slm_id: str, now: float) -> None:
        self._arrivals += 1
        self._last_arrival[slm_id] = self._arrivals

    def _retention_value(self, footprint: ModelFootprint, now: float) -> float:
        return self._last_arrival.get(footprint.slm_id, 0)


class LeastFrequentlyUsed(Planner):
    """Evicts the SLM with the fewest requests so far."""

    def __init__(self, options: ResidencyOptions) -> None:
        super().__init__(options)
        self._counts: dict[str, int] = {}

    def _on_arrival(self, slm_id: str, now: float) -> None:
        self._counts[slm_id] = self._counts.get(slm_id, 0) + 1

    def _retention_value(self, footprint: ModelFootprint, now: float) -> float:
        return self._counts.get(footprint.slm_id, 0)


class Static(Planner):
    """Keeps the pinned SLMs, then those that fit in the fleet file's order; wakes no other SLM."""

    def _retention_value(self, footprint: ModelFootprint, now: float) -> float:
        return 0.0

    def _earliest_sleep_at(self, footprint: ModelFootprint, now: float) -> float:
        return math.inf


def build(options: ResidencyOptions, *, latency_per_s: float, energy_per_j: float) -> Planner:
    """The planner of `options.policy`; the weights are the goals', per second and per joule."""
    match options.policy:
        case ResidencyPolicyName.LRU:
            return LeastRecentlyUsed(options)
        case ResidencyPolicyName.LFU:
            return LeastFrequentlyUsed(options)
        case ResidencyPolicyName.STATIC:
            return Static(options)
        case _:
            return ForecastPlanner(options, latency_per_s=latency_per_s, energy_per_j=energy_per_j)
