"""Knowledge: the durable log and what is published. Owner: knowledge actor. The store blocks."""

from calm_serve.knowledge.outcome_reader import read_outcomes
from calm_serve.knowledge.service import KnowledgeService
from calm_serve.knowledge.store import OutcomeStore

__all__ = [
    "KnowledgeService",
    "OutcomeStore",
    "read_outcomes",
]
