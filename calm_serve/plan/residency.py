"""Which SLMs are hot, asleep or cold: forecast arrivals times what a wake-up costs, per byte.

The CALM paper (arXiv 2602.03632) keeps a fixed number of models, least recently used first out;
see `residency_baselines.py`. Here SLMs have sizes, wake-ups have a price and a bound, requests
that wait are served together, and what is likely next is woken before it is asked for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from calm_serve.config import ResidencyOptions
from calm_serve.plan.forecast import Forecast
from calm_serve.plan.occupancy import Demand, Occupant, Plan
from calm_serve.plan.residency_base import Planner
from calm_serve.types import Residency

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

    def step(self, now: float, demand: Demand, occupants: Sequence[Occupant]) -> Plan:
        """Take in what happened and return the tiers to reach."""
        self._forecast.set_slms(tuple(o.slm_id for o in occupants))
        self._expected = {}
        return super().step(now, demand, occupants)

    def _observe(self, slm_id: str, now: float) -> None:
        self._forecast.observe(slm_id, now)

    def _worth(self, occupant: Occupant, now: float) -> float:
        return self._value(occupant, now) / max(occupant.bytes, 1)

    def _value(self, occupant: Occupant, now: float) -> float:
        """Quality points that being hot saves until the next change."""
        if not self._expected:
            self._rate = self._forecast.rate_per_s(now)
            residence_s = self._options.min_resident_s + occupant.wake_s
            self._horizon = max(self._rate * residence_s, HORIZON_ARRIVALS)
            self._expected = self._forecast.expected(self._horizon)
        return self._expected.get(occupant.slm_id, 0.0) * self._wake_cost(occupant)

    def _wake_cost(self, occupant: Occupant) -> float:
        return self._latency_per_s * occupant.wake_s + self._energy_per_j * occupant.wake_j

    def _free_at(self, occupant: Occupant, now: float) -> float:
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

    def _swap(self, occupant: Occupant, victims: Iterable[Occupant], now: float) -> None:
        super()._swap(occupant, victims, now)
        self._wakes.append(now)

    def _yields(self, victim: Occupant, to: Occupant, now: float) -> bool:
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

    def _anticipate(self, now: float, by_id: Mapping[str, Occupant], demand: Demand) -> None:
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
