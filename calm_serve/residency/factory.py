"""The residency planner for the configured policy."""

from __future__ import annotations

from calm_serve.config import ResidencyOptions, ResidencyPolicyName
from calm_serve.residency.baselines import LeastFrequentlyUsed, LeastRecentlyUsed, Static
from calm_serve.residency.planner import ForecastPlanner, Planner


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
