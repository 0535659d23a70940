"""A pure cache simulator: replays a trace of preferred SLMs under any residency policy.

A hit is an arrival whose preferred SLM is hot. Waking and sleeping take no time here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calm_serve.residency import (
    IN_MEMORY,
    Demand,
    ModelFootprint,
    Planner,
    within_budget,
)
from calm_serve.types import Residency

Trace = Sequence[tuple[float, str]]  # seconds, preferred SLM; seconds do not decrease
STEP_S = 0.25  # period of the planner between arrivals ...
MAX_IDLE_STEPS = 8  # ... for at most this many steps, to expire requests and to prefetch


@dataclass(frozen=True, slots=True)
class Replayed:
    """The result of a policy on a trace."""

    arrivals: int
    hits: int
    swaps: int  # wake-ups
    waited_s: float  # sum over requests, until their SLM was hot
    expired: int  # requests whose SLM was not hot within `hold_s`
    peak_bytes: int

    @property
    def hit_ratio(self) -> float:
        """Hits per arrival."""
        return self.hits / max(self.arrivals, 1)


class _Cache:
    def __init__(
        self,
        planner: Planner,
        footprints: Sequence[ModelFootprint],
        budget_bytes: int,
        hold_s: float,
    ) -> None:
        self._planner, self._budget, self._hold_s = planner, budget_bytes, hold_s
        self._footprints = {o.slm_id: o for o in footprints}
        self._residency = {o.slm_id: o.observed for o in footprints}
        self._published: dict[str, Residency] = {}
        self.waiting: dict[str, list[float]] = {}
        self.waited_s = 0.0
        self.expired = self.peak_bytes = 0

    def is_hot(self, slm_id: str) -> bool:
        return self._residency[slm_id] is Residency.HOT

    def step(self, now: float, arrivals: Sequence[str] = ()) -> None:
        demand = Demand(arrivals, {i: len(w) for i, w in self.waiting.items() if w})
        before = dict(self._residency)
        plan = self._planner.step(now, demand, self._now())
        for _ in range(2):  # SLMs that sleep make room for those that wake
            desired = within_budget(plan, self._now(), self._published, self._budget)
            self._published, self._residency = desired, dict(desired)
            hot = [self._footprints[i] for i, t in desired.items() if t in IN_MEMORY]
            self.peak_bytes = max(self.peak_bytes, sum(o.bytes for o in hot))
        for slm_id, since in self.waiting.items():
            if self.is_hot(slm_id):
                self.waited_s += sum(now - s for s in since)
                since.clear()
            late = [s for s in since if now - s >= self._hold_s]
            self.expired += len(late)
            self.waited_s += sum(now - s for s in late)
            self.waiting[slm_id] = [s for s in since if s not in late]
        if before != self._residency:
            # Report the change, so that the planner knows its time.
            self._planner.step(now, Demand((), self._queued()), self._now())

    def _queued(self) -> dict[str, int]:
        return {i: len(w) for i, w in self.waiting.items() if w}

    def _now(self) -> list[ModelFootprint]:
        return [
            ModelFootprint(
                o.slm_id,
                o.bytes_by_node,
                self._residency[o.slm_id],
                o.wake_s,
                o.wake_j,
                o.answer_s,
                o.pinned,
                o.may_go_cold,
            )
            for o in self._footprints.values()
        ]


def replay(
    trace: Trace,
    planner: Planner,
    footprints: Sequence[ModelFootprint],
    budget_bytes: int,
    hold_s: float = 30.0,
) -> Replayed:
    """Run `planner` over the trace, starting with the footprints' residency."""
    cache = _Cache(planner, footprints, budget_bytes, hold_s)
    hits, clock = 0, trace[0][0] if trace else 0.0
    cache.step(clock)
    for at, slm_id in trace:
        for _ in range(MAX_IDLE_STEPS):
            if clock + STEP_S >= at:
                break
            clock += STEP_S
            cache.step(clock)
        clock = at
        if cache.is_hot(slm_id):
            hits += 1
        else:
            cache.waiting.setdefault(slm_id, []).append(at)
        cache.step(at, (slm_id,))
    return Replayed(
        len(trace), hits, planner.swaps, cache.waited_s, cache.expired, cache.peak_bytes
    )


def ids_of(trace: Trace) -> list[str]:
    """The preferred SLMs in order, as `belady` takes them."""
    return [slm_id for _, slm_id in trace]
