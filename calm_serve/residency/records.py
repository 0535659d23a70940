"""Who takes memory, who asks for it, and what may be ordered without exceeding the budget.

The records between the residency planner and whoever runs it. An SLM's replicas are hot or asleep
together; bytes are declared ones, counted per node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from calm_serve.types import Residency

OCCUPYING = frozenset((Residency.HOT, Residency.STARTING))
"""Tiers in which an SLM's declared bytes are taken."""


@dataclass(frozen=True, slots=True)
class ModelFootprint:
    """One SLM as it is now."""

    slm_id: str
    bytes_by_node: Mapping[str, int]  # declared bytes of its replicas while they are hot
    tier: Residency = Residency.ASLEEP
    wake_s: float = 1.0  # from the order to wake until it answers
    wake_j: float = 0.0
    answer_s: float = 1.0  # one typical answer: how long draining takes
    pinned: bool = False
    may_go_cold: bool = False
    running: int = 0  # requests that it is answering

    @property
    def bytes(self) -> int:
        """Declared bytes on all nodes."""
        return sum(self.bytes_by_node.values())


@dataclass(frozen=True, slots=True)
class Demand:
    """What was asked for since the last step, and what waits now."""

    arrivals: Sequence[str] = ()  # preferred SLM of each request, in order, as if all were hot
    held: Mapping[str, int] = field(default_factory=dict)  # requests that wait for an SLM


@dataclass(frozen=True, slots=True)
class Plan:
    """Tiers to reach: HOT, ASLEEP or COLD for each SLM."""

    tiers: Mapping[str, Residency]
    wakes: tuple[str, ...]  # SLMs to be woken, in this order, as soon as there is room
    waits: Mapping[str, float]  # seconds until an SLM that is not hot could answer; inf: never


class MemoryBudget:
    """Declared bytes per node against a budget."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self.used: dict[str, int] = {}

    def add(self, occupant: ModelFootprint, times: int = 1) -> None:
        """Take the occupant's bytes; `times` -1 gives them back."""
        for node, size in occupant.bytes_by_node.items():
            self.used[node] = self.used.get(node, 0) + times * size

    def copy(self) -> MemoryBudget:
        """The same room, to try things in."""
        other = MemoryBudget(self._budget)
        other.used = dict(self.used)
        return other

    def fits(self, occupant: ModelFootprint) -> bool:
        """Whether the occupant's bytes are free on every node of its replicas."""
        return all(
            self.used.get(node, 0) + size <= self._budget
            for node, size in occupant.bytes_by_node.items()
        )

    @property
    def overfull(self) -> bool:
        """Whether any node is above the budget."""
        return any(used > self._budget for used in self.used.values())


def publishable(
    plan: Plan,
    occupants: Sequence[ModelFootprint],
    published: Mapping[str, Residency],
    budget_bytes: int,
) -> dict[str, Residency]:
    """The tiers that may be ordered now without the hot ones ever exceeding the budget.

    Sleep is ordered at once; a wake-up only when its bytes are free, which they are when the SLMs
    that gave way have reported that they sleep or are gone. `published` are the orders so far: an
    SLM that was told to wake counts as hot already, and is not told otherwise before it woke,
    because nobody could tell then which of the two orders its report was about.
    """
    room = MemoryBudget(budget_bytes)
    tiers = dict(plan.tiers)
    waiting: list[ModelFootprint] = []
    for occupant in occupants:
        wanted = tiers[occupant.slm_id] is Residency.HOT
        ordered = published.get(occupant.slm_id) is Residency.HOT
        if ordered and occupant.tier is Residency.ASLEEP:
            tiers[occupant.slm_id] = Residency.HOT
            room.add(occupant)
        elif occupant.tier in OCCUPYING or (wanted and ordered):
            room.add(occupant)
        elif wanted:
            waiting.append(occupant)
            tiers[occupant.slm_id] = Residency.ASLEEP
    waiting.sort(key=lambda o: plan.wakes.index(o.slm_id))
    for occupant in waiting:
        if room.fits(occupant):
            room.add(occupant)
            tiers[occupant.slm_id] = Residency.HOT
    return tiers
