"""Where the knowledge actor is found: a name and a namespace, and what to do with an old one.

Imports nothing.
"""

from __future__ import annotations

NAMESPACE = "calm_serve"
# The actor outlives deployments. One of an older program lacks methods that callers use.
OLDER_ACTOR = "the knowledge actor runs an older program; remove it and deploy again"


def actor_name(app_name: str) -> str:
    """Name of the application's knowledge actor in NAMESPACE."""
    return f"knowledge-{app_name}"
