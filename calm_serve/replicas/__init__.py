"""Replicas: which replica of the chosen SLM gets a request. Owner: router. Never blocks.

Takes the states of an SLM's replicas and what this process sent to them, gives a ranking. Touches
nothing but its own bounded index.
"""

from calm_serve.replicas.prefix_index import PrefixIndex
from calm_serve.replicas.queue_lengths import QueueLengths
from calm_serve.replicas.ranking import EXPLORATION_RATIO, ReplicaRequest, rank_for_prompt

__all__ = [
    "EXPLORATION_RATIO",
    "PrefixIndex",
    "QueueLengths",
    "ReplicaRequest",
    "rank_for_prompt",
]
