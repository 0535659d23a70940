"""Routing: the choice of the SLM. Owner: router, on the path of every request. Never blocks."""

from calm_serve.routing.scoring import slo_penalty, weights_of
from calm_serve.routing.selector import ModelSelector, config_version

__all__ = [
    "ModelSelector",
    "config_version",
    "slo_penalty",
    "weights_of",
]
