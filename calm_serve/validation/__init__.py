"""Validation of an answer's form. Owner: SLM replica, in a thread of it. May block.

Takes an answer's text with a JSON schema or labels, gives a `QualitySignal`. Touches no file and no
network; a check can take some 100 ms of CPU.
"""

from calm_serve.validation.validators import validate

__all__ = [
    "validate",
]
