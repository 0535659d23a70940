"""Other residency policies to compare with, and the offline optimum.

LRU is the CALM paper's (arXiv 2602.03632), LFU its usual rival, `static` never moves anything.
They keep the budget and the pins, and have no guards, no forecast and no prefetch. `belady` (IBM
Systems Journal 5(2), 1966) knows the future; `belady_bound` is for SLMs of unequal sizes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Hashable, Mapping, Sequence

from calm_serve.config import ResidencyOptions, ResidencyPolicyName
from calm_serve.plan.occupancy import Occupant
from calm_serve.plan.residency import ResidencyPlanner
from calm_serve.plan.residency_base import Planner


class LeastRecentlyUsed(Planner):
    """Whoever was wanted longest ago goes first."""

    def __init__(self, options: ResidencyOptions) -> None:
        super().__init__(options)
        self._arrival = 0
        self._last: dict[str, int] = {}

    def _observe(self, slm_id: str, now: float) -> None:
        self._arrival += 1
        self._last[slm_id] = self._arrival

    def _worth(self, occupant: Occupant, now: float) -> float:
        return self._last.get(occupant.slm_id, 0)


class LeastFrequentlyUsed(Planner):
    """Whoever was wanted least often goes first."""

    def __init__(self, options: ResidencyOptions) -> None:
        super().__init__(options)
        self._counts: dict[str, int] = {}

    def _observe(self, slm_id: str, now: float) -> None:
        self._counts[slm_id] = self._counts.get(slm_id, 0) + 1

    def _worth(self, occupant: Occupant, now: float) -> float:
        return self._counts.get(occupant.slm_id, 0)


class Static(Planner):
    """The pinned SLMs and the first others that fit stay; nobody else is ever woken."""

    def _worth(self, occupant: Occupant, now: float) -> float:
        return 0.0

    def _free_at(self, occupant: Occupant, now: float) -> float:
        return math.inf


def build(options: ResidencyOptions, *, latency_per_s: float, energy_per_j: float) -> Planner:
    """The planner that `options` name; the weights are those of the goals."""
    match options.policy:
        case ResidencyPolicyName.LRU:
            return LeastRecentlyUsed(options)
        case ResidencyPolicyName.LFU:
            return LeastFrequentlyUsed(options)
        case ResidencyPolicyName.STATIC:
            return Static(options)
        case _:
            return ResidencyPlanner(options, latency_per_s=latency_per_s, energy_per_j=energy_per_j)


def belady(
    trace: Sequence[Hashable],
    slots: int,
    start: Collection[Hashable] = (),
    *,
    bypass: bool = False,
) -> int:
    """Most hits that any policy with `slots` equal places and loading on a miss can have.

    On a miss the one that is wanted furthest in the future goes; with `bypass`, that may be the
    one just asked for, which is then answered without a place, so nobody does better without
    prefetch. `start` is what the places hold first.

    >>> belady("abcabc", 2), belady("abcabc", 2, bypass=True)
    (2, 2)
    """
    uses: dict[Hashable, list[int]] = {}
    for at, key in enumerate(trace):
        uses.setdefault(key, []).append(at)

    def next_use(key: Hashable, after: int) -> float:
        own = uses.get(key, [])
        position = bisect_right(own, after)
        return own[position] if position < len(own) else math.inf

    held = set(list(start)[:slots])
    hits = 0
    for at, key in enumerate(trace):
        if key in held:
            hits += 1
            continue
        if slots <= 0:
            continue
        if len(held) >= slots:
            furthest = max(held, key=lambda k: next_use(k, at))
            if bypass and next_use(furthest, at) <= next_use(key, at):
                continue
            held.remove(furthest)
        held.add(key)
    return hits


def belady_bound(
    trace: Sequence[str], sizes: Mapping[str, int], budget_bytes: int, start: Collection[str] = ()
) -> int:
    """At least as many hits as any policy of unequal sizes can have that loads on a miss.

    With unequal sizes the optimum is NP-hard. However they are chosen, no more SLMs fit than the
    smallest ones do, so as many equal places, with bypass, are an upper bound.
    """
    left, places = budget_bytes, 0
    for size in sorted(sizes.values()):
        if size > left:
            break
        left -= size
        places += 1
    return belady(trace, max(places, len(start)), start, bypass=True)
