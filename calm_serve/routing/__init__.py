"""Routing: the choice of the SLM for each request. Owner: router. Never blocks.

Takes a parsed request and the SLMs' live states from memory, gives a `Decision`. On the path of
every request, so no I/O, no remote call and no wait.
"""

from calm_serve.routing.scoring import (
    above_floor,
    evaluate,
    explore,
    ranked,
    reward,
    slo_penalty,
    weights_of,
)
from calm_serve.routing.selector import ModelSelector, config_version
from calm_serve.routing.unfamiliar import unfamiliar_order

__all__ = [
    "ModelSelector",
    "above_floor",
    "config_version",
    "evaluate",
    "explore",
    "ranked",
    "reward",
    "slo_penalty",
    "unfamiliar_order",
    "weights_of",
]
