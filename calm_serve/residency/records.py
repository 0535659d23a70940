"""Records between the residency planner and its callers: footprints, demand, plan, memory budget.

All replicas of an SLM are hot or asleep together. Bytes are the declared ones, counted per node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from calm_serve.types import Residency

IN_MEMORY = frozenset((Residency.HOT, Residency.STARTING))
"""Observed tiers in which an SLM takes its declared bytes."""


@dataclass(frozen=True, slots=True)
class ModelFootprint:
    """One SLM as observed now: what it takes in memory, and what moving it costs."""

    slm_id: str
    bytes_by_node: Mapping[str, int]  # declared bytes of its replicas while they are hot
    observed: Residency = Residency.ASLEEP
    wake_s: float = 1.0  # from the decision to wake it until it answers
    wake_j: float = 0.0
    answer_s: float = 1.0  # one typical answer: how long draining takes
    pinned: bool = False
    may_go_cold: bool = False
    running: int = 0  # requests in its replicas

    @property
    def bytes(self) -> int:
        """Declared bytes on all nodes."""
        return sum(self.bytes_by_node.values())


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests since the last step, and requests queued for a wake-up now."""

    arrivals: Sequence[str] = ()  # preferred SLM of each request, in order, as if all were hot
    queued: Mapping[str, int] = field(default_factory=dict)  # SLM -> requests that wait for it


@dataclass(frozen=True, slots=True)
class Plan:
    """What a planner decided."""

    desired: Mapping[str, Residency]  # HOT, ASLEEP or COLD for each SLM
    wake_order: tuple[str, ...]  # SLMs to wake, in this order, as soon as their bytes are free
    wait_s: Mapping[str, float]  # until an SLM that is not hot could answer; inf: never


class MemoryBudget:
    """Declared bytes in use per node, against one limit that holds for each node."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes: dict[str, int] = {}

    def add(self, footprint: ModelFootprint) -> None:
        """Count the footprint's bytes as used, whether they fit or not."""
        for node, size in footprint.bytes_by_node.items():
            self._used_bytes[node] = self._used_bytes.get(node, 0) + size

    def remove(self, footprint: ModelFootprint) -> None:
        """Free the bytes of a footprint that was added."""
        for node, size in footprint.bytes_by_node.items():
            self._used_bytes[node] = self._used_bytes.get(node, 0) - size

    def copy(self) -> MemoryBudget:
        """An independent copy, to try changes on."""
        other = MemoryBudget(self._limit_bytes)
        other._used_bytes = dict(self._used_bytes)
        return other

    def fits(self, footprint: ModelFootprint) -> bool:
        """Whether the footprint's bytes are free on every node of its replicas."""
        return all(
            self._used_bytes.get(node, 0) + size <= self._limit_bytes
            for node, size in footprint.bytes_by_node.items()
        )

    @property
    def exceeded(self) -> bool:
        """Whether any node is above the limit."""
        return any(used > self._limit_bytes for used in self._used_bytes.values())


def within_budget(
    plan: Plan,
    footprints: Sequence[ModelFootprint],
    published: Mapping[str, Residency],
    budget_bytes: int,
) -> dict[str, Residency]:
    """The part of a plan that can be published now without exceeding the budget on the way.

    Sleep is published at once. A wake-up is published only when its bytes are free, that is when
    the evicted SLMs have reported that they sleep, or are gone; until then it stays ASLEEP.

    Args:
        plan: what the planner wants to reach.
        footprints: every SLM as observed now.
        published: the desired residency published so far. An SLM published as HOT counts as in
            memory, and one that still sleeps stays HOT until it has woken: its next report could
            otherwise be the answer to either of two changes.
        budget_bytes: limit per node.
    """
    budget = MemoryBudget(budget_bytes)
    desired = dict(plan.desired)
    waiting: list[ModelFootprint] = []
    for footprint in footprints:
        planned_hot = desired[footprint.slm_id] is Residency.HOT
        published_hot = published.get(footprint.slm_id) is Residency.HOT
        if published_hot and footprint.observed is Residency.ASLEEP:
            desired[footprint.slm_id] = Residency.HOT
            budget.add(footprint)
        elif footprint.observed in IN_MEMORY or (planned_hot and published_hot):
            budget.add(footprint)
        elif planned_hot:
            waiting.append(footprint)
            desired[footprint.slm_id] = Residency.ASLEEP
    waiting.sort(key=lambda f: plan.wake_order.index(f.slm_id))
    for footprint in waiting:
        if budget.fits(footprint):
            budget.add(footprint)
            desired[footprint.slm_id] = Residency.HOT
    return desired
