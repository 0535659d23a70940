"""Replicas: which replica of the chosen SLM gets a request. Owner: router. Never blocks.

Takes the states of an SLM's replicas, what this process sent to them and what they answered and
reported; gives a ranking by predicted seconds to the first token. Touches nothing but its own
bounded memory.
"""

from calm_serve.replicas.first_token import FirstTokenEstimator
from calm_serve.replicas.prefix_index import PrefixIndex
from calm_serve.replicas.queue_lengths import QueueLengths
from calm_serve.replicas.ranking import EXPLORATION_RATIO, ReplicaRequest, rank_for_prompt

__all__ = [
    "EXPLORATION_RATIO",
    "FirstTokenEstimator",
    "PrefixIndex",
    "QueueLengths",
    "ReplicaRequest",
    "rank_for_prompt",
]
