"""Residency: which SLMs are in memory. Owner: knowledge actor. Never blocks."""

from calm_serve.residency.coordinator import RESIDENCY_KEY, ResidencyCoordinator
from calm_serve.residency.factory import build
from calm_serve.residency.planner import Planner
from calm_serve.residency.records import OCCUPYING, Demand, ModelFootprint, publishable

__all__ = [
    "OCCUPYING",
    "RESIDENCY_KEY",
    "Demand",
    "ModelFootprint",
    "Planner",
    "ResidencyCoordinator",
    "build",
    "publishable",
]
