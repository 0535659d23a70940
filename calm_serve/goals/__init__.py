"""Goals: weights that move until the operator's targets hold. Owner: router. Never blocks."""

from calm_serve.goals.controller import GoalController

__all__ = [
    "GoalController",
]
