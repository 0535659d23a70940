"""Knowledge: the durable log, and the published topics. Owner: knowledge actor. May block.

Takes outcomes, feedback and reports of routers and SLM replicas; gives the records of
`protocol.topics`. Touches the store and the state directory. `KnowledgeService` itself never blocks
its event loop: the store has a thread of its own, training a child process.
"""

from calm_serve.knowledge.outcome_reader import read_outcomes
from calm_serve.knowledge.service import KnowledgeService
from calm_serve.knowledge.store import OutcomeStore

__all__ = [
    "KnowledgeService",
    "OutcomeStore",
    "read_outcomes",
]
