"""Residency planners: the mechanism that every policy shares, and the policy `calm`.

`Planner` keeps the memory budget of each node and the pins, wakes SLMs for queued requests in the
order in which their queues formed, and estimates how long each queue will wait. A policy overrides
the hooks: the retention value of an SLM, when it may be evicted and for which SLM, how often SLMs
may be woken, and which SLMs are prefetched.

Pure and synchronous: time comes in as seconds of the caller's monotonic clock.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from calm_serve.config import Goals, ResidencyOptions
from calm_serve.residency.forecast import Forecast
from calm_serve.residency.records import (
    IN_MEMORY,
    Demand,
    MemoryBudget,
    ModelFootprint,
    Plan,
)
from calm_serve.types import Residency


class Planner(ABC):
    """Decides the desired residency of each SLM. Subclasses are policies; they override the hooks.

    Call `step` whenever demand or an observed residency changed, and once in a while otherwise.
    """

    def __init__(self, options: ResidencyOptions) -> None:
        """Raises ValueError when `options` have no memory budget."""
        if options.memory_budget_bytes is None:
            raise ValueError("a planner needs a memory budget")
        self._options = options
        self._budget_bytes = int(options.memory_budget_bytes)
        self._footprints: dict[str, ModelFootprint] = {}  # of the present step
        self._desired: dict[str, Residency] = {}
        self._hot_since: dict[str, float] = {}
        self._demanded_at: dict[str, float] = {}  # last arrival or queued request
        self._queued_since: dict[str, float] = {}
        self._swap_of: dict[str, int] = {}  # SLM -> number of the swap that woke it last; 0: none
        self.swaps = 0  # wake-ups decided so far

    def step(self, now: float, demand: Demand, footprints: Sequence[ModelFootprint]) -> Plan:
        """Take in demand and the observed state of every SLM; return the residency to reach."""
        self._footprints = {f.slm_id: f for f in footprints}
        self._follow_fleet(now)
        for slm_id in demand.arrivals:
            if slm_id in self._footprints:
                self._demanded_at[slm_id] = now
                self._on_arrival(slm_id, now)
        queue = self._update_queue(now, demand)
        self._enforce_pins_and_budget(now)
        for slm_id in queue:
            self._admit(self._footprints[slm_id], now)
        self._prefetch(now, demand)
        self._let_go_cold(now)
        waking = [i for i in self._desired if self._is_waking(self._footprints[i])]
        waking.sort(key=lambda i: (queue.index(i) if i in queue else len(queue), self._swap_of[i]))
        return Plan(dict(self._desired), tuple(waking), self._estimate_waits(now, queue))

    # Hooks: what a policy decides.

    def _on_arrival(self, slm_id: str, now: float) -> None:
        """Take in one request that prefers the SLM; called before anything is decided."""
        del slm_id, now

    def _on_wake(self, now: float) -> None:
        """Take in that a wake-up was decided."""
        del now

    @abstractmethod
    def _retention_value(self, footprint: ModelFootprint, now: float) -> float:
        """Value of keeping the SLM hot, in a unit that the policy defines.

        The lowest value is evicted first; among equal values, the SLM that joined first.
        """

    def _earliest_sleep_at(self, footprint: ModelFootprint, now: float) -> float:
        """Earliest time at which the SLM may be put to sleep to make room for another."""
        del footprint
        return now

    def _earliest_wake_at(self, now: float) -> float:
        """Earliest time at which any SLM may be woken."""
        return now

    def _can_evict(self, victim: ModelFootprint, waiting: ModelFootprint, now: float) -> bool:
        """Whether `victim` may sleep for the requests that are queued for `waiting`."""
        del victim, waiting, now
        return True

    def _prefetch(self, now: float, demand: Demand) -> None:
        """Wake SLMs that no request waits for, with `_evictions` and `_swap`."""
        del now, demand

    # The mechanism, also for the hooks to use.

    def _evictions(
        self, footprint: ModelFootprint, candidates: Iterable[ModelFootprint], now: float
    ) -> list[ModelFootprint] | None:
        """The candidates of lowest value whose sleep lets `footprint` fit; None if none do."""
        budget = self._desired_use()
        chosen: list[ModelFootprint] = []
        for victim in sorted(candidates, key=lambda f: self._retention_value(f, now)):
            if budget.fits(footprint):
                break
            chosen.append(victim)
            budget.remove(victim)
        if not budget.fits(footprint):
            return None
        for victim in chosen[-2::-1]:  # a small one may have been taken before a large one
            budget.add(victim)
            if budget.fits(footprint):
                chosen.remove(victim)
            else:
                budget.remove(victim)
        return chosen

    def _swap(
        self, footprint: ModelFootprint, victims: Iterable[ModelFootprint], now: float
    ) -> None:
        """Wake the SLM, and put the victims to sleep for it."""
        for victim in victims:
            self._desired[victim.slm_id] = Residency.ASLEEP
        self._desired[footprint.slm_id] = Residency.HOT
        self.swaps += 1
        self._swap_of[footprint.slm_id] = self.swaps
        self._on_wake(now)

    def _evictable(self, now: float) -> list[ModelFootprint]:
        """SLMs that may sleep now. One that is waking is left out: requests may wait for it."""
        return [
            f
            for f in self._desired_hot()
            if f.observed is Residency.HOT
            and not f.pinned
            and self._earliest_sleep_at(f, now) <= now
        ]

    def _follow_fleet(self, now: float) -> None:
        """Take in SLMs that joined or left, and those that have just become hot."""
        for slm_id in [i for i in self._desired if i not in self._footprints]:
            del self._desired[slm_id]
            for known in (self._hot_since, self._demanded_at, self._queued_since, self._swap_of):
                known.pop(slm_id, None)
        budget = self._desired_use()
        new = [f for i, f in self._footprints.items() if i not in self._desired]
        # SLMs that are in memory stay there, as after a restart; then all that fit, pinned first.
        for footprint in sorted(new, key=lambda f: (not f.pinned, f.observed not in IN_MEMORY)):
            cold = footprint.observed is Residency.COLD and footprint.may_go_cold
            if footprint.pinned or (not cold and budget.fits(footprint)):
                self._desired[footprint.slm_id] = Residency.HOT
                budget.add(footprint)
            else:
                self._desired[footprint.slm_id] = Residency.COLD if cold else Residency.ASLEEP
            self._demanded_at[footprint.slm_id], self._swap_of[footprint.slm_id] = now, 0
        for slm_id, desired in self._desired.items():
            footprint = self._footprints[slm_id]
            if desired is Residency.HOT and footprint.observed is Residency.HOT:
                self._hot_since.setdefault(slm_id, now)
                continue
            was_hot = self._hot_since.pop(slm_id, None) is not None
            if was_hot and footprint.may_go_cold and footprint.observed is Residency.COLD:
                self._desired[slm_id] = Residency.COLD  # Serve has stopped its last replica

    def _update_queue(self, now: float, demand: Demand) -> list[str]:
        """SLMs with queued requests, the queue that formed first coming first."""
        queued = {i for i, n in demand.queued.items() if n > 0 and i in self._footprints}
        self._queued_since = {i: s for i, s in self._queued_since.items() if i in queued}
        for slm_id in demand.queued:
            if slm_id in queued:
                self._queued_since.setdefault(slm_id, now)
                self._demanded_at[slm_id] = now
        return sorted(self._queued_since, key=self._queued_since.__getitem__)

    def _enforce_pins_and_budget(self, now: float) -> None:
        """Wake what is pinned; put SLMs to sleep when replicas were added beyond the budget."""
        for footprint in self._footprints.values():
            if footprint.pinned:
                self._desired[footprint.slm_id] = Residency.HOT
        budget = self._desired_use()
        movable = [f for f in self._desired_hot() if not f.pinned]
        for victim in sorted(movable, key=lambda f: self._retention_value(f, now)):
            if not budget.exceeded:
                return
            self._desired[victim.slm_id] = Residency.ASLEEP
            budget.remove(victim)

    def _admit(self, footprint: ModelFootprint, now: float) -> None:
        """Wake an SLM that requests wait for, if the SLMs in its way may be evicted."""
        already_hot = self._desired[footprint.slm_id] is Residency.HOT
        if already_hot or self._earliest_wake_at(now) > now:
            return
        candidates = [f for f in self._evictable(now) if self._can_evict(f, footprint, now)]
        victims = self._evictions(footprint, candidates, now)
        if victims is not None:
            self._swap(footprint, victims, now)

    def _let_go_cold(self, now: float) -> None:
        """Make SLMs cold that no request has preferred for `cold_after_s`."""
        after_s = self._options.cold_after_s
        for slm_id, desired in self._desired.items():
            footprint = self._footprints[slm_id]
            if after_s is None or not footprint.may_go_cold or footprint.running:
                continue
            if desired is not Residency.COLD and now - self._demanded_at[slm_id] >= after_s:
                self._desired[slm_id] = Residency.COLD

    def _estimate_waits(self, now: float, queue: Sequence[str]) -> dict[str, float]:
        """Seconds until each SLM that is not hot could answer, by simulating the queue.

        An SLM without queued requests gets the estimate of one that joins the queue now.
        """
        wait_s: dict[str, float] = {}
        draining = [f.answer_s for f in self._footprints.values() if self._is_draining(f)]
        drain_s = max(draining, default=0.0)
        sleep_at = {
            f.slm_id: max(self._earliest_sleep_at(f, now), now) + (f.answer_s if f.running else 0.0)
            for f in self._desired_hot()
            if not f.pinned
        }
        wake_at = self._earliest_wake_at(now)
        budget = self._desired_use()
        for slm_id in queue:
            footprint = self._footprints[slm_id]
            if self._desired[slm_id] is Residency.HOT:
                continue
            at, victims = _earliest_fit(footprint, budget, sleep_at, wake_at, self._footprints)
            wait_s[slm_id] = max(at - now, 0.0) + footprint.wake_s
            if math.isfinite(at):
                for victim in victims:
                    budget.remove(self._footprints[victim])
                    del sleep_at[victim]
                budget.add(footprint)
                ready = at + footprint.wake_s
                sleep_at[slm_id] = ready + max(self._options.min_resident_s, footprint.answer_s)
                wake_at = max(wake_at, at)
        for slm_id, footprint in self._footprints.items():
            if slm_id not in wait_s and self._desired[slm_id] is not Residency.HOT:
                at, _ = _earliest_fit(footprint, budget, sleep_at, wake_at, self._footprints)
                wait_s[slm_id] = max(at - now, 0.0) + footprint.wake_s
            elif self._is_waking(footprint):
                wait_s[slm_id] = drain_s + footprint.wake_s
        return wait_s

    def _desired_use(self) -> MemoryBudget:
        """The budget with all SLMs in it that are hot or to be hot."""
        budget = MemoryBudget(self._budget_bytes)
        for footprint in self._desired_hot():
            budget.add(footprint)
        return budget

    def _desired_hot(self) -> list[ModelFootprint]:
        return [self._footprints[i] for i, r in self._desired.items() if r is Residency.HOT]

    def _is_waking(self, footprint: ModelFootprint) -> bool:
        desired_hot = self._desired[footprint.slm_id] is Residency.HOT
        return desired_hot and footprint.observed is not Residency.HOT

    def _is_draining(self, footprint: ModelFootprint) -> bool:
        desired_hot = self._desired[footprint.slm_id] is Residency.HOT
        return not desired_hot and footprint.observed is Residency.HOT and footprint.running > 0


def _earliest_fit(
    footprint: ModelFootprint,
    budget: MemoryBudget,
    sleep_at: Mapping[str, float],
    wake_at: float,
    footprints: Mapping[str, ModelFootprint],
) -> tuple[float, list[str]]:
    """When `footprint` fits at the earliest, and the SLMs that sleep by then; (inf, []) if never.

    `sleep_at` has the time at which each SLM of the budget can be asleep.
    """
    at, asleep = wake_at, []
    trial = budget.copy()
    for slm_id in sorted(sleep_at, key=sleep_at.__getitem__):
        if trial.fits(footprint):
            break
        trial.remove(footprints[slm_id])
        asleep.append(slm_id)
        at = max(at, sleep_at[slm_id])
    return (at, asleep) if trial.fits(footprint) else (math.inf, [])


# The constants below were chosen with the simulated workloads of `python -m load_tests paper`,
# whose hit rate and swaps notice a change.
MIN_HORIZON_ARRIVALS = 4.0
"""Shortest horizon of a retention value, which otherwise is the arrivals during one residence."""
URGENCY_DOUBLING_S = 1.0
"""A new queue weighs as much as one arrival in an eviction; the weight doubles in this time."""
MAX_DOUBLINGS = 64.0
"""Keeps the urgency of a queue finite; it exceeds any retention value long before this bound."""
BURST_WINDOW_S = 10.0
"""Limits a burst: of the wake-ups per minute, a window of this length gets its share by time."""
PREFETCH_SHARE = 0.5
"""Share of the allowed wake-ups that prefetches may use; the rest is for queued requests."""
PREFETCH_MARGIN_WAKES = 0.03
"""Wake-ups that a prefetch must be expected to save beyond its own energy: forecasts are noisy."""


_GOALS = Goals()  # whose weights are the default ones


class ForecastPlanner(Planner):
    """The policy `calm`: keeps the highest forecast value per byte, and prefetches.

    Retention value per byte = expected arrivals x (latency weight x wake_s + energy weight x
    wake_j) / bytes, over the arrivals of one residence. Guards against thrash: an SLM that woke
    stays for `min_resident_s`; wake-ups are bounded per minute; an SLM in demand is evicted only
    for requests that have waited long relative to its value, so that in a burst SLMs of low demand
    evict each other and not the SLMs in demand; a prefetch must save more than it costs.
    """

    def __init__(
        self,
        options: ResidencyOptions,
        *,
        latency_per_s: float = _GOALS.latency_weight_per_s,
        energy_per_j: float = _GOALS.energy_weight_per_j,
    ) -> None:
        """The weights are the goals': quality points per second and per joule."""
        super().__init__(options)
        # With both weights at zero every SLM would have the value 0.
        self._latency_per_s = latency_per_s if latency_per_s or energy_per_j else 1.0
        self._energy_per_j = energy_per_j
        self._forecast = Forecast()
        self._expected_arrivals: dict[str, float] = {}  # SLM -> within this step's horizon
        self._horizon_arrivals, self._rate_per_s = MIN_HORIZON_ARRIVALS, 0.0
        self._wakes: deque[float] = deque(maxlen=options.max_swaps_per_min)
        self._max_burst = max(int(options.max_swaps_per_min * BURST_WINDOW_S / 60.0), 1)

    def step(self, now: float, demand: Demand, footprints: Sequence[ModelFootprint]) -> Plan:
        """Take in demand and the observed state of every SLM; return the residency to reach."""
        self._forecast.set_slms(tuple(f.slm_id for f in footprints))
        self._expected_arrivals = {}
        return super().step(now, demand, footprints)

    def _on_arrival(self, slm_id: str, now: float) -> None:
        self._forecast.observe(slm_id, now)

    def _on_wake(self, now: float) -> None:
        self._wakes.append(now)

    def _retention_value(self, footprint: ModelFootprint, now: float) -> float:
        """Quality points per byte that being hot saves until the horizon."""
        return self._saving(footprint, now) / max(footprint.bytes, 1)

    def _saving(self, footprint: ModelFootprint, now: float) -> float:
        """Quality points that being hot saves until the horizon."""
        if not self._expected_arrivals:
            self._rate_per_s = self._forecast.rate_per_s(now)
            # One horizon for all SLMs, whichever is valued first. The median, because a cold SLM,
            # which takes a whole start to wake, must not stretch the horizon of the others.
            wake_s = median(f.wake_s for f in self._footprints.values())
            residence_s = self._options.min_resident_s + wake_s
            self._horizon_arrivals = max(self._rate_per_s * residence_s, MIN_HORIZON_ARRIVALS)
            self._expected_arrivals = self._forecast.expected(self._horizon_arrivals)
        return self._expected_arrivals.get(footprint.slm_id, 0.0) * self._wake_cost(footprint)

    def _wake_cost(self, footprint: ModelFootprint) -> float:
        """Quality points that one request loses by a wake-up."""
        return self._latency_per_s * footprint.wake_s + self._energy_per_j * footprint.wake_j

    def _earliest_sleep_at(self, footprint: ModelFootprint, now: float) -> float:
        """An SLM stays hot for `min_resident_s` after it woke."""
        since = self._hot_since.get(footprint.slm_id, now)
        return since + self._options.min_resident_s

    def _earliest_wake_at(self, now: float, share: float = 1.0) -> float:
        """When a wake-up keeps within `share` of the limits per minute and per BURST_WINDOW_S."""
        at = now
        limits = ((self._wakes.maxlen or 1, 60.0), (self._max_burst, BURST_WINDOW_S))
        for limit, window_s in limits:
            allowed = max(int(limit * share), 1)
            if len(self._wakes) >= allowed:
                at = max(at, self._wakes[-allowed] + window_s)
        return at

    def _can_evict(self, victim: ModelFootprint, waiting: ModelFootprint, now: float) -> bool:
        """Whether the waiting SLM's saving, plus its queue's urgency, exceeds the victim's.

        Both savings count only the arrivals until the victim could be hot again, because at low
        rates the arrivals of the whole horizon may come much later.
        """
        away_s = self._options.min_resident_s + waiting.wake_s + waiting.answer_s + victim.wake_s
        saving, value = self._saving(waiting, now), self._retention_value(victim, now)
        share = self._rate_per_s * away_s / self._horizon_arrivals
        if victim.running:  # it is in demand now
            share = max(share, 1.0)
        # The urgency doubles every second, so no SLM waits for ever, however high the
        # victim's value.
        waited_s = now - self._queued_since[waiting.slm_id]
        doublings = min(waited_s / URGENCY_DOUBLING_S, MAX_DOUBLINGS)
        urgency = math.exp2(doublings) * self._wake_cost(waiting)
        return (saving * share + urgency) / max(waiting.bytes, 1) > value * share

    def _prefetch(self, now: float, demand: Demand) -> None:
        """Evict others for an SLM that requests will probably prefer soon: at most one per step."""
        if self._earliest_wake_at(now, PREFETCH_SHARE) > now:
            return
        asleep = [
            f
            for i, f in self._footprints.items()
            if self._desired[i] is Residency.ASLEEP and f.observed is Residency.ASLEEP
        ]
        candidates = [
            f for f in self._evictable(now) if not f.running and not demand.queued.get(f.slm_id)
        ]
        for footprint in sorted(asleep, key=lambda f: -self._retention_value(f, now)):
            victims = self._evictions(footprint, candidates, now)
            if victims is None:
                continue
            gain = self._saving(footprint, now) - sum(self._saving(v, now) for v in victims)
            margin = PREFETCH_MARGIN_WAKES * self._wake_cost(footprint)
            if gain > self._energy_per_j * footprint.wake_j + margin:
                self._swap(footprint, victims, now)
                return
