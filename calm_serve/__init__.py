"""The decision core. Owner and "may block": see the first line of each room.

This package is the decision core. It imports no Ray, no vLLM and no web framework, so that every
decision can be made, explained, replayed and tested in a plain Python process. `deployments/` is
the edge that runs it.
"""

__version__ = "0.1.0"
