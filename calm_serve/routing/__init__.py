"""Routing: the choice of the SLM. Owner: router, on the path of every request. Never blocks."""

from calm_serve.routing.scoring import above_floor, reward, slo_penalty, weights_of
from calm_serve.routing.selector import ModelSelector, config_version

__all__ = [
    "ModelSelector",
    "above_floor",
    "config_version",
    "reward",
    "slo_penalty",
    "weights_of",
]
