"""Validation: does an answer have the form that it should? Owner: SLM replica, off its event loop.
May block.
"""

from calm_serve.validation.validators import validate

__all__ = [
    "validate",
]
