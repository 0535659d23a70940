"""The mechanism that every residency policy shares.

A budget per node, pins, requests that wait served in the order in which SLMs began to be waited
for, and an honest estimate of how long that takes. A policy says what an SLM is worth keeping for,
and who may leave when.

Pure and synchronous: time comes in as seconds of the caller's monotonic clock.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from calm_serve.config import ResidencyOptions
from calm_serve.residency.forecast import Forecast
from calm_serve.residency.records import (
    OCCUPYING,
    Demand,
    MemoryBudget,
    ModelFootprint,
    Plan,
)
from calm_serve.types import Residency


class Planner(ABC):
    """The mechanism. `step` is called whenever something changed, and now and then without."""

    def __init__(self, options: ResidencyOptions) -> None:
        if options.memory_budget_bytes is None:
            raise ValueError("a planner needs a memory budget")
        self._options = options
        self._budget = int(options.memory_budget_bytes)
        self._tiers: dict[str, Residency] = {}
        self._hot_since: dict[str, float] = {}
        self._wanted_at: dict[str, float] = {}
        self._held_since: dict[str, float] = {}
        self.swaps = 0  # wake-ups ordered so far

    def step(self, now: float, demand: Demand, occupants: Sequence[ModelFootprint]) -> Plan:
        """Take in what happened and return the tiers to reach."""
        by_id = {o.slm_id: o for o in occupants}
        self._follow(now, by_id)
        for slm_id in demand.arrivals:
            if slm_id in by_id:
                self._wanted_at[slm_id] = now
                self._observe(slm_id, now)
        queue = self._queue(now, demand, by_id)
        self._make_legal(now, by_id)
        for slm_id in queue:
            self._admit(by_id[slm_id], now, by_id)
        self._anticipate(now, by_id, demand)
        self._cool(now, by_id)
        wakes = [i for i in self._tiers if self._pending(by_id[i])]
        wakes.sort(key=lambda i: queue.index(i) if i in queue else len(queue))
        return Plan(dict(self._tiers), tuple(wakes), self._waits(now, queue, by_id))

    # What a policy says.

    def _observe(self, slm_id: str, now: float) -> None:
        """An SLM was wanted."""
        del slm_id, now

    @abstractmethod
    def _worth(self, occupant: ModelFootprint, now: float) -> float:
        """What keeping it hot is worth; the least goes first. 0 keeps the fleet's order."""

    def _free_at(self, occupant: ModelFootprint, now: float) -> float:
        """Earliest time at which the SLM may be put to sleep for another."""
        del occupant
        return now

    def _swap_at(self, now: float) -> float:
        """Earliest time at which an SLM may be woken."""
        return now

    def _yields(self, victim: ModelFootprint, to: ModelFootprint, now: float) -> bool:
        """Whether the SLM may go to sleep for one for which requests wait."""
        del victim, to, now
        return True

    def _anticipate(self, now: float, by_id: Mapping[str, ModelFootprint], demand: Demand) -> None:
        """Change tiers without being asked."""
        del now, by_id, demand

    # The mechanism.

    def _follow(self, now: float, by_id: Mapping[str, ModelFootprint]) -> None:
        """Take in SLMs that came or went, and those that have just become hot."""
        for slm_id in [i for i in self._tiers if i not in by_id]:
            del self._tiers[slm_id]
            for known in (self._hot_since, self._wanted_at, self._held_since):
                known.pop(slm_id, None)
        room = self._room(by_id)
        new = [o for i, o in by_id.items() if i not in self._tiers]
        # What is in memory stays there, as after a restart; then whatever fits, pinned first.
        for occupant in sorted(new, key=lambda o: (not o.pinned, o.tier not in OCCUPYING)):
            cold = occupant.tier is Residency.COLD and occupant.may_go_cold
            if occupant.pinned or (not cold and room.fits(occupant)):
                self._tiers[occupant.slm_id] = Residency.HOT
                room.add(occupant)
            else:
                self._tiers[occupant.slm_id] = Residency.COLD if cold else Residency.ASLEEP
            self._wanted_at[occupant.slm_id] = now
        for slm_id, tier in self._tiers.items():
            occupant = by_id[slm_id]
            if tier is Residency.HOT and occupant.tier is Residency.HOT:
                self._hot_since.setdefault(slm_id, now)
                continue
            was_hot = self._hot_since.pop(slm_id, None) is not None
            if was_hot and occupant.may_go_cold and occupant.tier is Residency.COLD:
                self._tiers[slm_id] = Residency.COLD  # Serve has taken its last replica

    def _queue(self, now: float, demand: Demand, by_id: Mapping[str, ModelFootprint]) -> list[str]:
        """SLMs for which requests wait, the longest wait first."""
        held = {i for i, count in demand.held.items() if count > 0 and i in by_id}
        self._held_since = {i: s for i, s in self._held_since.items() if i in held}
        for slm_id in demand.held:
            if slm_id in held:
                self._held_since.setdefault(slm_id, now)
                self._wanted_at[slm_id] = now
        return sorted(self._held_since, key=self._held_since.__getitem__)

    def _make_legal(self, now: float, by_id: Mapping[str, ModelFootprint]) -> None:
        """Pins hold, and the budget does: replicas may have been added."""
        for occupant in by_id.values():
            if occupant.pinned:
                self._tiers[occupant.slm_id] = Residency.HOT
        room = self._room(by_id)
        movable = [o for o in self._hot(by_id) if not o.pinned]
        for victim in sorted(movable, key=lambda o: self._worth(o, now)):
            if not room.overfull:
                return
            self._tiers[victim.slm_id] = Residency.ASLEEP
            room.add(victim, -1)

    def _admit(
        self, occupant: ModelFootprint, now: float, by_id: Mapping[str, ModelFootprint]
    ) -> None:
        """Give a waiting SLM its memory, at the cost of others if they may go."""
        if self._tiers[occupant.slm_id] is Residency.HOT or self._swap_at(now) > now:
            return
        hot = [o for o in self._hot(by_id) if self._leaves(o, now)]
        movable = [o for o in hot if self._yields(o, occupant, now)]
        victims = self._victims(occupant, movable, now, by_id)
        if victims is not None:
            self._swap(occupant, victims, now)

    def _victims(
        self,
        occupant: ModelFootprint,
        movable: Iterable[ModelFootprint],
        now: float,
        by_id: Mapping[str, ModelFootprint],
    ) -> list[ModelFootprint] | None:
        """The least worthy that make room for `occupant`; None when all of them would not."""
        room = self._room(by_id)
        chosen: list[ModelFootprint] = []
        for victim in sorted(movable, key=lambda o: self._worth(o, now)):
            if room.fits(occupant):
                break
            chosen.append(victim)
            room.add(victim, -1)
        if not room.fits(occupant):
            return None
        for victim in chosen[-2::-1]:  # a small one may have been taken before a large one
            room.add(victim)
            if room.fits(occupant):
                chosen.remove(victim)
            else:
                room.add(victim, -1)
        return chosen

    def _swap(
        self, occupant: ModelFootprint, victims: Iterable[ModelFootprint], now: float
    ) -> None:
        del now
        for victim in victims:
            self._tiers[victim.slm_id] = Residency.ASLEEP
        self._tiers[occupant.slm_id] = Residency.HOT
        self.swaps += 1

    def _leaves(self, occupant: ModelFootprint, now: float) -> bool:
        # One that is waking is let wake: requests may be waiting for it.
        awake = occupant.tier is Residency.HOT and not occupant.pinned
        return awake and self._free_at(occupant, now) <= now

    def _cool(self, now: float, by_id: Mapping[str, ModelFootprint]) -> None:
        after_s = self._options.cold_after_s
        for slm_id, tier in self._tiers.items():
            occupant = by_id[slm_id]
            if after_s is None or not occupant.may_go_cold or occupant.running:
                continue
            if tier is not Residency.COLD and now - self._wanted_at[slm_id] >= after_s:
                self._tiers[slm_id] = Residency.COLD

    def _waits(
        self, now: float, queue: Sequence[str], by_id: Mapping[str, ModelFootprint]
    ) -> dict[str, float]:
        """Play the queue forward: who may leave when, and who gets that room.

        The SLMs that nobody waits for yet are told what the end of the queue would wait.
        """
        waits: dict[str, float] = {}
        drain_s = max((o.answer_s for o in by_id.values() if self._draining(o)), default=0.0)
        leaving = {
            o.slm_id: max(self._free_at(o, now), now) + (o.answer_s if o.running else 0.0)
            for o in self._hot(by_id)
            if not o.pinned
        }
        swap_at = self._swap_at(now)
        room = self._room(by_id)
        for slm_id in queue:
            occupant = by_id[slm_id]
            if self._tiers[slm_id] is Residency.HOT:
                continue
            at, gone = self._room_at(occupant, leaving, room, swap_at, by_id)
            waits[slm_id] = max(at - now, 0.0) + occupant.wake_s
            if math.isfinite(at):
                for victim in gone:
                    room.add(by_id[victim], -1)
                    del leaving[victim]
                room.add(occupant)
                ready = at + occupant.wake_s
                leaving[slm_id] = ready + max(self._options.min_resident_s, occupant.answer_s)
                swap_at = max(swap_at, at)
        for slm_id, occupant in by_id.items():
            if slm_id not in waits and self._tiers[slm_id] is not Residency.HOT:
                at, _ = self._room_at(occupant, leaving, room, swap_at, by_id)
                waits[slm_id] = max(at - now, 0.0) + occupant.wake_s
            elif self._pending(occupant):
                waits[slm_id] = drain_s + occupant.wake_s
        return waits

    @staticmethod
    def _room_at(
        occupant: ModelFootprint,
        leaving: Mapping[str, float],
        room: MemoryBudget,
        swap_at: float,
        by_id: Mapping[str, ModelFootprint],
    ) -> tuple[float, list[str]]:
        """When `occupant` fits, those who leave first being gone; (inf, []) when never."""
        at, gone = swap_at, []
        trial = room.copy()
        for slm_id in sorted(leaving, key=leaving.__getitem__):
            if trial.fits(occupant):
                break
            trial.add(by_id[slm_id], -1)
            gone.append(slm_id)
            at = max(at, leaving[slm_id])
        return (at, gone) if trial.fits(occupant) else (math.inf, [])

    def _room(self, by_id: Mapping[str, ModelFootprint]) -> MemoryBudget:
        room = MemoryBudget(self._budget)
        for occupant in self._hot(by_id):
            room.add(occupant)
        return room

    def _hot(self, by_id: Mapping[str, ModelFootprint]) -> list[ModelFootprint]:
        return [by_id[i] for i, t in self._tiers.items() if t is Residency.HOT and i in by_id]

    def _pending(self, occupant: ModelFootprint) -> bool:
        return self._tiers[occupant.slm_id] is Residency.HOT and occupant.tier is not Residency.HOT

    def _draining(self, occupant: ModelFootprint) -> bool:
        asleep_soon = self._tiers[occupant.slm_id] is not Residency.HOT
        return asleep_soon and occupant.tier is Residency.HOT and occupant.running > 0


# Arrivals ahead that a swap is judged by where few come; at high rates, those of its residence.
HORIZON_ARRIVALS = 4.0
# Who waits counts as one arrival against an SLM that is hot, and double after each of these.
PATIENCE_S = 1.0
MAX_DOUBLINGS = 64.0
# Wake-ups are spread over the minute: no more than their share of it within SPREAD_S.
SPREAD_S = 10.0
# Prefetches leave this share of the wake-ups to requests that wait.
PREFETCH_SHARE = 0.5
# A prefetch must be expected to save this many wake-ups beyond its own price: forecasts are noisy.
MARGIN = 0.03


class ResidencyPlanner(Planner):
    """Keeps what the forecast makes worth most per byte, and wakes what is likely to be next.

    Worth per byte = expected arrivals x (latency weight x wake_s + energy weight x wake_j) / bytes,
    over the arrivals of a residence. An SLM that woke stays for `min_resident_s`; wake-ups are
    bounded per minute; an SLM goes only for requests that have waited long against what it is
    worth, so that in a burst those that few want take turns in the places that are worth least;
    nothing is prefetched unless that saves more than it costs.
    """

    def __init__(
        self, options: ResidencyOptions, *, latency_per_s: float = 0.1, energy_per_j: float = 0.002
    ) -> None:
        """The weights are the goals': quality points per second and per joule."""
        super().__init__(options)
        # With neither weight at all every SLM would be worth nothing.
        self._latency_per_s = latency_per_s if latency_per_s or energy_per_j else 1.0
        self._energy_per_j = energy_per_j
        self._forecast = Forecast()
        self._expected: dict[str, float] = {}  # arrivals of this step's horizon, by SLM
        self._horizon, self._rate = HORIZON_ARRIVALS, 0.0
        self._wakes: deque[float] = deque(maxlen=options.max_swaps_per_min)
        self._spread = max(int(options.max_swaps_per_min * SPREAD_S / 60.0), 1)

    def step(self, now: float, demand: Demand, occupants: Sequence[ModelFootprint]) -> Plan:
        """Take in what happened and return the tiers to reach."""
        self._forecast.set_slms(tuple(o.slm_id for o in occupants))
        self._expected = {}
        return super().step(now, demand, occupants)

    def _observe(self, slm_id: str, now: float) -> None:
        self._forecast.observe(slm_id, now)

    def _worth(self, occupant: ModelFootprint, now: float) -> float:
        return self._value(occupant, now) / max(occupant.bytes, 1)

    def _value(self, occupant: ModelFootprint, now: float) -> float:
        """Quality points that being hot saves until the next change."""
        if not self._expected:
            self._rate = self._forecast.rate_per_s(now)
            residence_s = self._options.min_resident_s + occupant.wake_s
            self._horizon = max(self._rate * residence_s, HORIZON_ARRIVALS)
            self._expected = self._forecast.expected(self._horizon)
        return self._expected.get(occupant.slm_id, 0.0) * self._wake_cost(occupant)

    def _wake_cost(self, occupant: ModelFootprint) -> float:
        return self._latency_per_s * occupant.wake_s + self._energy_per_j * occupant.wake_j

    def _free_at(self, occupant: ModelFootprint, now: float) -> float:
        since = self._hot_since.get(occupant.slm_id, now)
        return since + self._options.min_resident_s

    def _swap_at(self, now: float, share: float = 1.0) -> float:
        """Bounded per minute, and per SPREAD_S so that one burst does not use up a minute."""
        at = now
        for limit, window_s in ((self._wakes.maxlen or 1, 60.0), (self._spread, SPREAD_S)):
            allowed = max(int(limit * share), 1)
            if len(self._wakes) >= allowed:
                at = max(at, self._wakes[-allowed] + window_s)
        return at

    def _swap(
        self, occupant: ModelFootprint, victims: Iterable[ModelFootprint], now: float
    ) -> None:
        super()._swap(occupant, victims, now)
        self._wakes.append(now)

    def _yields(self, victim: ModelFootprint, to: ModelFootprint, now: float) -> bool:
        # What either would be worth until the victim could be back, in time and not in arrivals:
        # where few come, nobody waits for the sake of those who might.
        away_s = self._options.min_resident_s + to.wake_s + to.answer_s + victim.wake_s
        value, worth = self._value(to, now), self._worth(victim, now)
        share = self._rate * away_s / self._horizon
        if victim.running:  # it is wanted now
            share = max(share, 1.0)
        # However much the victim is wanted, it gives way within a few doublings: nobody starves.
        doublings = min((now - self._held_since[to.slm_id]) / PATIENCE_S, MAX_DOUBLINGS)
        urgency = math.exp2(doublings) * self._wake_cost(to)
        return (value * share + urgency) / max(to.bytes, 1) > worth * share

    def _anticipate(self, now: float, by_id: Mapping[str, ModelFootprint], demand: Demand) -> None:
        """Wake what is likely to be wanted next, instead of what is not: one SLM per step."""
        if self._swap_at(now, PREFETCH_SHARE) > now:
            return
        asleep = [
            o
            for i, o in by_id.items()
            if self._tiers[i] is Residency.ASLEEP and o.tier is Residency.ASLEEP
        ]
        movable = [
            o
            for o in self._hot(by_id)
            if self._leaves(o, now) and not o.running and not demand.held.get(o.slm_id)
        ]
        for occupant in sorted(asleep, key=lambda o: -self._worth(o, now)):
            victims = self._victims(occupant, movable, now, by_id)
            if victims is None:
                continue
            gain = self._value(occupant, now) - sum(self._value(v, now) for v in victims)
            if gain > self._energy_per_j * occupant.wake_j + MARGIN * self._wake_cost(occupant):
                self._swap(occupant, victims, now)
                return
