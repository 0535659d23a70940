"""Residency: which SLMs are in memory. Owner: knowledge actor. Blocks at its creation only.

Public: `ResidencyCoordinator`, which runs in the actor and reads its stored settings when it is
created; and for simulations the planner that
`build` returns, its records, and `within_budget`.
"""

from calm_serve.residency.coordinator import RESIDENCY_KEY, ResidencyCoordinator
from calm_serve.residency.planner import Planner
from calm_serve.residency.policies import build
from calm_serve.residency.records import IN_MEMORY, Demand, ModelFootprint, within_budget

__all__ = [
    "IN_MEMORY",
    "RESIDENCY_KEY",
    "Demand",
    "ModelFootprint",
    "Planner",
    "ResidencyCoordinator",
    "build",
    "within_budget",
]
