"""Where the knowledge actor is found: a name and a namespace. Imports nothing."""

from __future__ import annotations

NAMESPACE = "calm_serve"


def actor_name(app_name: str) -> str:
    """Name of the application's knowledge actor in NAMESPACE."""
    return f"knowledge-{app_name}"
