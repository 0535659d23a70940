"""Residency in the live service: routers say what is wanted, replicas what they are, here it meets.

The desk steps the planner and publishes the tiers that replicas and routers follow. The sum of what
is hot, waking or ordered to wake never exceeds the budget by its doing: an SLM is told to wake only
when those that gave way have reported that they sleep, or are gone. Without a budget it is silent.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError

from calm_serve.config import ResidencyOptions, SLMSpec
from calm_serve.protocol.reports import DemandReply, DemandReport, ResidencySummary
from calm_serve.protocol.topics import DesiredResidency
from calm_serve.residency.factory import build
from calm_serve.residency.planner import Planner
from calm_serve.residency.records import OCCUPYING, Demand, ModelFootprint, publishable
from calm_serve.telemetry import DEFAULT_WATTS_PER_CORE, DecayedRate, Ewma
from calm_serve.types import Residency

RESIDENCY_KEY = "residency"
ROUTER_EXPIRY_S = 5.0  # a router that said nothing for so long waits for nothing
RESTART_PATIENCE_S = 10.0  # after a restart, replicas have this long to say what they are
FIRST_WAKE_S = 1.0  # believed before any wake-up was measured
WAKE_HALF_LIFE_S = 600.0
RECENT_S = 60.0
MAX_ROUTERS = 256
_log = logging.getLogger(__name__)


class MetaStore(Protocol):
    """Small texts that survive a restart."""

    def meta(self, key: str) -> str | None:
        """The text, None when there is none."""
        ...


@dataclass(slots=True)
class _Router:
    heard_at: float
    held: dict[str, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)


class ResidencyCoordinator:
    """One application's residency. Used on one event loop; every method returns at once.

    Args:
        store: remembers the settings over a restart.
        publish: takes the desired tiers whenever they changed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: MetaStore,
        publish: Callable[[DesiredResidency], None],
        clock: Callable[[], float],
    ) -> None:
        self._publish, self._clock = publish, clock
        self._options = ResidencyOptions()
        self._planner: Planner | None = None
        self._specs: dict[str, SLMSpec] = {}
        self._routers: dict[str, _Router] = {}
        self._replicas = ReplicaResidency()
        self._published: dict[str, Residency] = {}
        self._waits: dict[str, float] = {}
        self._planned_at: dict[str, float] = {}  # SLM -> when it was first to be woken
        self._wake: dict[str, Ewma] = {}
        self._wake_cpu_s: dict[str, float] = {}
        self._hits = self._misses = self._peak_bytes = 0
        self._started = self._told = False
        now = clock()
        self._recent = (DecayedRate(RECENT_S, now), DecayedRate(RECENT_S, now))
        self._silent_until = now
        if text := store.meta(RESIDENCY_KEY):
            self._restore(text)
            # Replicas are as they were; nobody may be woken before they have said how that is.
            self._silent_until = now + RESTART_PATIENCE_S

    def configure(
        self, options: ResidencyOptions, latency_per_s: float, energy_per_j: float
    ) -> str:
        """Take settings, of a deployment or an operator; return the text to keep for a restart.

        Counts of hits, swaps and bytes start anew.
        """
        told = options.model_dump(mode="json")
        self._hits = self._misses = self._peak_bytes = 0
        self._apply(told, latency_per_s, energy_per_j)
        self._silent_until = self._clock()
        self.step()
        return json.dumps(
            {"options": told, "latency_per_s": latency_per_s, "energy_per_j": energy_per_j}
        )

    def set_slms(self, specs: Iterable[SLMSpec]) -> None:
        """Follow SLMs that came or went; remote ones take no memory here."""
        self._specs = {s.id: s for s in specs if s.locality == "local"}
        self.step()

    def report_demand(self, router_id: str, report: DemandReport) -> DemandReply:
        """Take a router's report; `router_id` names the router process."""
        now = self._clock()
        while len(self._routers) >= MAX_ROUTERS and router_id not in self._routers:
            self._routers.pop(min(self._routers, key=lambda r: self._routers[r].heard_at))
        self._routers[router_id] = _Router(now, dict(report.queued), dict(report.running))
        for slm_id, replicas in report.replicas.items():
            for replica_id, node in replicas.items():
                self._replicas.seen(slm_id, replica_id, node, now)
        self._hits += report.hits
        self._misses += report.misses
        for rate, count in zip(self._recent, (report.hits, report.misses), strict=True):
            rate.add(count, now)
        self.step(report.wanted)
        return DemandReply(dict(self._waits), self.summary())

    def report(self, slm_id: str, replica_id: str, state: str, times: Mapping[str, float]) -> None:
        """A replica's word: the state it is in now; `times` may have the seconds of its wake-up."""
        now = self._clock()
        tier = self._replicas.reported(slm_id, replica_id, state, now)
        if "wake" in times:  # its first start is none
            self._wake_cpu_s[slm_id] = times["wake"]
            if tier is Residency.HOT and (since := self._planned_at.pop(slm_id, None)):
                self._wake.setdefault(slm_id, Ewma(WAKE_HALF_LIFE_S)).add(now - since, now)
        self.step()

    def step(self, wanted: Iterable[str] = ()) -> None:
        """Plan, and publish what may be ordered now."""
        if self._planner is None or not self._specs:
            return
        now = self._clock()
        self._forget(now)
        occupants = [self._occupant(s, now) for s in self._specs.values()]
        self._watch_peak(hot_bytes(occupants))
        if now < self._silent_until and not self._all_heard():
            return
        plan = self._planner.step(now, Demand(tuple(wanted), self._sum("held")), occupants)
        self._waits = dict(plan.waits)
        for slm_id in plan.wakes:
            self._planned_at.setdefault(slm_id, now)
        for slm_id in set(self._planned_at) - set(plan.wakes):
            del self._planned_at[slm_id]
        orders = publishable(plan, occupants, self._published, self._budget)
        if orders != self._published or not self._told:
            self._published = orders
            self._tell()

    def summary(self) -> ResidencySummary | None:
        """Budget, bytes, swaps and hits, for people; None without a budget."""
        if self._planner is None:
            return None
        now = self._clock()
        hits, misses = (rate.per_s(now) for rate in self._recent)
        occupants = [self._occupant(s, now) for s in self._specs.values()]
        return ResidencySummary(
            policy=str(self._options.policy),
            budget_bytes=self._budget,
            hot_bytes=hot_bytes(occupants),
            peak_bytes=self._peak_bytes,
            swaps=self._planner.swaps,
            hits=self._hits,
            misses=self._misses,
            hit_ratio=_ratio(self._hits, self._misses),
            recent_hit_ratio=_ratio(hits, misses),
            held_requests=sum(self._sum("held").values()),
        )

    def _restore(self, text: str) -> None:
        try:
            self._apply(**json.loads(text))
        except (ValidationError, TypeError) as error:  # another version of the program wrote it
            _log.warning("stored residency settings passed over: %s", error)

    def _apply(self, options: Mapping[str, Any], latency_per_s: float, energy_per_j: float) -> None:
        self._options = ResidencyOptions.model_validate(options)
        self._planner, had, self._told = None, self._planner is not None, False
        if self._options.memory_budget_bytes is not None:
            self._planner = build(
                self._options, latency_per_s=latency_per_s, energy_per_j=energy_per_j
            )
        elif had:
            self._published, self._waits = {}, {}
            self._tell()  # everybody is hot again

    def _tell(self) -> None:
        self._publish(DesiredResidency(dict(self._published), self._options))
        self._told = True

    def _watch_peak(self, used_bytes: int) -> None:
        # While the fleet starts, every replica loads before it can sleep.
        if self._replicas.settled and used_bytes <= self._budget and self._all_heard():
            self._started = True
        if self._started:
            self._peak_bytes = max(self._peak_bytes, used_bytes)

    @property
    def _budget(self) -> int:
        return int(self._options.memory_budget_bytes or 0)

    def _forget(self, now: float) -> None:
        """Routers that are silent, and replicas that routers saw and see no more."""
        for router_id in [
            i for i, r in self._routers.items() if now - r.heard_at > ROUTER_EXPIRY_S
        ]:
            del self._routers[router_id]
        if not self._routers:
            return  # nobody looks
        self._replicas.forget(max(r.heard_at for r in self._routers.values()))

    def _all_heard(self) -> bool:
        return all(s.id in self._replicas.heard for s in self._specs.values() if _stays(s))

    def _occupant(self, spec: SLMSpec, now: float) -> ModelFootprint:
        tier = self._replicas.tier(spec, now)
        priors = spec.priors
        return ModelFootprint(
            spec.id,
            self._replicas.bytes_by_node(spec),
            tier=tier,
            wake_s=priors.wake_s if tier is Residency.COLD else self._wake_s(spec.id),
            wake_j=self._wake_cpu_s.get(spec.id, FIRST_WAKE_S)
            * spec.resources.threads
            * DEFAULT_WATTS_PER_CORE,
            answer_s=priors.ttft_s + priors.tpot_s * priors.output_tokens,
            pinned=spec.residency == "pinned",
            may_go_cold=spec.residency == "on_demand" and spec.scaling.min_replicas == 0,
            running=sum(r.running.get(spec.id, 0) for r in self._routers.values()),
        )

    def _wake_s(self, slm_id: str) -> float:
        """Measured from the plan to the report; before that, the mean of the others'."""
        measured = {i: e.mean for i, e in self._wake.items() if e.mean is not None}
        if slm_id in measured:
            return measured[slm_id]
        return sum(measured.values()) / len(measured) if measured else FIRST_WAKE_S

    def _sum(self, what: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for router in self._routers.values():
            for slm_id, count in getattr(router, what).items():
                total[slm_id] = total.get(slm_id, 0) + count
        return total


def _stays(spec: SLMSpec) -> bool:
    return spec.residency != "on_demand"


def _ratio(hits: float, misses: float) -> float | None:
    return hits / (hits + misses) if hits + misses > 0.0 else None


GONE_AFTER_S = 1.5  # a replica that no router has seen for so long, two looks, has died
START_PATIENCE_S = 600.0  # a replica that no router has seen yet may take so long
# A replica that Serve owes is believed to be on its way for so long; then it cannot be started.
OWED_PATIENCE_S = 60.0
MAX_REPLICAS = 4096

_STATES = {
    "ready": Residency.HOT,
    "waking": Residency.STARTING,
    "importing": Residency.STARTING,  # takes its memory within seconds
    "starting engine": Residency.STARTING,
    "warming up": Residency.STARTING,
    "asleep": Residency.ASLEEP,
}
_SETTLED = (Residency.HOT, Residency.ASLEEP)
_ORDER = (Residency.HOT, Residency.STARTING, Residency.ASLEEP)


@dataclass(slots=True)
class _Replica:
    slm_id: str
    tier: Residency
    heard_at: float
    reported: bool = False
    seen_at: float | None = None  # by a router
    node: str = ""


class ReplicaResidency:
    """Every replica of the fleet, those that were ordered and have not spoken yet included."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._owed_since: dict[str, float] = {}  # SLM that has fewer replicas than it should

    def seen(self, slm_id: str, replica_id: str, node: str, now: float) -> None:
        """A router sees the replica. One that is not known, as after a restart, counts as hot."""
        replica = self._of(slm_id, replica_id, Residency.HOT, now)
        replica.seen_at, replica.node = now, node

    def reported(self, slm_id: str, replica_id: str, state: str, now: float) -> Residency:
        """The replica says what it does; returns the tier that this is."""
        replica = self._of(slm_id, replica_id, Residency.COLD, now)
        replica.tier, replica.reported = _STATES.get(state, Residency.COLD), True
        replica.heard_at = now
        return replica.tier

    def forget(self, last_look: float) -> None:
        """Drop replicas that routers saw and see no more; the last of them looked at that time."""
        for replica_id, replica in list(self._replicas.items()):
            seen_at, patience_s = replica.seen_at, GONE_AFTER_S
            if seen_at is None:  # it starts, or it died while it did
                seen_at, patience_s = replica.heard_at, START_PATIENCE_S
            if last_look - seen_at > patience_s:
                del self._replicas[replica_id]

    @property
    def heard(self) -> set[str]:
        """SLMs of which a replica has spoken."""
        return {r.slm_id for r in self._replicas.values() if r.reported}

    @property
    def settled(self) -> bool:
        """Whether no replica is on its way to another tier."""
        return all(r.tier in _SETTLED for r in self._replicas.values())

    def tier(self, spec: SLMSpec, now: float) -> Residency:
        """The SLM's tier: that of its replica that takes most memory.

        Serve starts what is missing of `min_replicas`, so a missing replica is one that starts.
        """
        tiers = {r.tier for r in self._replicas.values() if r.slm_id == spec.id}
        if self._count(spec) >= spec.scaling.min_replicas:
            self._owed_since.pop(spec.id, None)
        elif now - self._owed_since.setdefault(spec.id, now) < OWED_PATIENCE_S:
            tiers.add(Residency.STARTING)
        return next((t for t in _ORDER if t in tiers), Residency.COLD)

    def bytes_by_node(self, spec: SLMSpec) -> dict[str, int]:
        """Declared bytes of the SLM's replicas while they are hot."""
        nodes: dict[str, int] = {}
        unplaced = max(self._count(spec), spec.scaling.min_replicas, 1)
        for replica in self._replicas.values():
            if replica.slm_id == spec.id and replica.node:
                nodes[replica.node] = nodes.get(replica.node, 0) + spec.declared_bytes
                unplaced -= 1
        # Where a replica will be, nobody knows yet: it counts on every node that there is.
        known = {r.node for r in self._replicas.values() if r.node} or {""}
        for node in known if unplaced else ():
            nodes[node] = nodes.get(node, 0) + unplaced * spec.declared_bytes
        return nodes

    def _count(self, spec: SLMSpec) -> int:
        return sum(1 for r in self._replicas.values() if r.slm_id == spec.id)

    def _of(self, slm_id: str, replica_id: str, tier: Residency, now: float) -> _Replica:
        replica = self._replicas.get(replica_id)
        if replica is None:
            if len(self._replicas) >= MAX_REPLICAS:
                del self._replicas[next(iter(self._replicas))]
            replica = self._replicas[replica_id] = _Replica(slm_id, tier, now)
        return replica


def hot_bytes(occupants: Iterable[ModelFootprint]) -> int:
    """Declared bytes in memory, on the fullest node."""
    nodes: dict[str, int] = {}
    for occupant in occupants:
        for node, size in occupant.bytes_by_node.items() if occupant.tier in OCCUPYING else ():
            nodes[node] = nodes.get(node, 0) + size
    return max(nodes.values(), default=0)
