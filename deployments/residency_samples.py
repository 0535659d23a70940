"""The part of GET /v1/fleet's answer about residency, as gauges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deployments.watch_samples import Sample

_FLEET = {
    "calm_residency_budget_bytes": "budget_bytes",
    "calm_residency_hot_bytes": "hot_bytes",
    "calm_residency_swaps": "swaps",
    "calm_held_requests": "held_requests",
}


def residency_samples(snapshot: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield the gauges; nothing of the fleet's without a memory budget."""
    residency = snapshot.get("residency") or {}
    for name, key in _FLEET.items():
        if (value := residency.get(key)) is not None:
            yield name, (), float(value)
    for slm in snapshot.get("slms", ()):
        if (wake_s := slm.get("wake_s")) is not None:
            yield "calm_slm_wake_seconds", (str(slm["id"]),), float(wake_s)
