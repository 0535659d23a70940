"""Goals: weights that move until the operator's targets hold. Owner: router. Never blocks.

Takes decisions and their outcomes, gives the weights of the next decisions. `calm replay` runs the
controller on a log. It touches nothing outside memory.
"""

from calm_serve.goals.controller import GoalController

__all__ = [
    "GoalController",
]
