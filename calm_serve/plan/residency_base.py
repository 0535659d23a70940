"""The mechanism that every residency policy shares.

A budget per node, pins, requests that wait served in the order in which SLMs began to be waited
for, and an honest estimate of how long that takes. A policy says what an SLM is worth keeping for,
and who may leave when.

Pure and synchronous: time comes in as seconds of the caller's monotonic clock.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from calm_serve.config import ResidencyOptions
from calm_serve.plan.occupancy import OCCUPYING, Demand, Occupant, Plan, Room
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

    def step(self, now: float, demand: Demand, occupants: Sequence[Occupant]) -> Plan:
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
    def _worth(self, occupant: Occupant, now: float) -> float:
        """What keeping it hot is worth; the least goes first. 0 keeps the fleet's order."""

    def _free_at(self, occupant: Occupant, now: float) -> float:
        """Earliest time at which the SLM may be put to sleep for another."""
        del occupant
        return now

    def _swap_at(self, now: float) -> float:
        """Earliest time at which an SLM may be woken."""
        return now

    def _yields(self, victim: Occupant, to: Occupant, now: float) -> bool:
        """Whether the SLM may go to sleep for one for which requests wait."""
        del victim, to, now
        return True

    def _anticipate(self, now: float, by_id: Mapping[str, Occupant], demand: Demand) -> None:
        """Change tiers without being asked."""
        del now, by_id, demand

    # The mechanism.

    def _follow(self, now: float, by_id: Mapping[str, Occupant]) -> None:
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

    def _queue(self, now: float, demand: Demand, by_id: Mapping[str, Occupant]) -> list[str]:
        """SLMs for which requests wait, the longest wait first."""
        held = {i for i, count in demand.held.items() if count > 0 and i in by_id}
        self._held_since = {i: s for i, s in self._held_since.items() if i in held}
        for slm_id in demand.held:
            if slm_id in held:
                self._held_since.setdefault(slm_id, now)
                self._wanted_at[slm_id] = now
        return sorted(self._held_since, key=self._held_since.__getitem__)

    def _make_legal(self, now: float, by_id: Mapping[str, Occupant]) -> None:
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

    def _admit(self, occupant: Occupant, now: float, by_id: Mapping[str, Occupant]) -> None:
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
        occupant: Occupant,
        movable: Iterable[Occupant],
        now: float,
        by_id: Mapping[str, Occupant],
    ) -> list[Occupant] | None:
        """The least worthy that make room for `occupant`; None when all of them would not."""
        room = self._room(by_id)
        chosen: list[Occupant] = []
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

    def _swap(self, occupant: Occupant, victims: Iterable[Occupant], now: float) -> None:
        del now
        for victim in victims:
            self._tiers[victim.slm_id] = Residency.ASLEEP
        self._tiers[occupant.slm_id] = Residency.HOT
        self.swaps += 1

    def _leaves(self, occupant: Occupant, now: float) -> bool:
        # One that is waking is let wake: requests may be waiting for it.
        awake = occupant.tier is Residency.HOT and not occupant.pinned
        return awake and self._free_at(occupant, now) <= now

    def _cool(self, now: float, by_id: Mapping[str, Occupant]) -> None:
        after_s = self._options.cold_after_s
        for slm_id, tier in self._tiers.items():
            occupant = by_id[slm_id]
            if after_s is None or not occupant.may_go_cold or occupant.running:
                continue
            if tier is not Residency.COLD and now - self._wanted_at[slm_id] >= after_s:
                self._tiers[slm_id] = Residency.COLD

    def _waits(
        self, now: float, queue: Sequence[str], by_id: Mapping[str, Occupant]
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
        occupant: Occupant,
        leaving: Mapping[str, float],
        room: Room,
        swap_at: float,
        by_id: Mapping[str, Occupant],
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

    def _room(self, by_id: Mapping[str, Occupant]) -> Room:
        room = Room(self._budget)
        for occupant in self._hot(by_id):
            room.add(occupant)
        return room

    def _hot(self, by_id: Mapping[str, Occupant]) -> list[Occupant]:
        return [by_id[i] for i, t in self._tiers.items() if t is Residency.HOT and i in by_id]

    def _pending(self, occupant: Occupant) -> bool:
        return self._tiers[occupant.slm_id] is Residency.HOT and occupant.tier is not Residency.HOT

    def _draining(self, occupant: Occupant) -> bool:
        asleep_soon = self._tiers[occupant.slm_id] is not Residency.HOT
        return asleep_soon and occupant.tier is Residency.HOT and occupant.running > 0
