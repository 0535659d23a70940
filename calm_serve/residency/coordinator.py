"""Residency in the live service: from reported demand and observed replicas to desired residency.

Routers report demand, SLM replicas report their state. `ResidencyCoordinator` steps the planner
with both and publishes the desired residency of each SLM, which replicas and routers follow. It
never publishes a wake-up that would exceed the memory budget: an SLM may wake only after the
replicas of the evicted SLMs have reported that they sleep, or are gone. Without a budget it
publishes nothing. `ObservedReplicas` holds the last reported state of each replica.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from calm_serve.config import ResidencyOptions, SLMSpec
from calm_serve.errors import KnowledgeError
from calm_serve.protocol.formats import RecordFormat
from calm_serve.protocol.reports import DemandReply, DemandReport, ResidencySummary
from calm_serve.protocol.topics import DesiredResidency
from calm_serve.residency.planner import Planner
from calm_serve.residency.policies import build
from calm_serve.residency.records import IN_MEMORY, Demand, ModelFootprint, within_budget
from calm_serve.telemetry import DEFAULT_WATTS_PER_CORE, DecayedRate, Ewma
from calm_serve.types import Residency

RESIDENCY_KEY = "residency"
ROUTER_EXPIRY_S = 5.0  # a router that has not reported for this long is dropped, with its queues
RESTART_PATIENCE_S = 10.0  # after a restart, the first plan waits so long for reports
FIRST_WAKE_S = 1.0  # assumed before any wake-up was measured
WAKE_HALF_LIFE_S = 600.0  # of the mean wake-up time of an SLM
RECENT_S = 60.0  # half-life of the recent hit ratio
MAX_ROUTERS = 256

GONE_AFTER_S = 1.5  # a replica that no router has listed for this long (two reports) has died
START_PATIENCE_S = 600.0  # a replica that no router has listed yet is dropped after this
# Routers list a replica within seconds after it is ready. They list none while there is no budget,
# so a replica that died before the budget was set is never listed.
READY_PATIENCE_S = 30.0
# A replica missing from `min_replicas` counts as starting for this long, then not any more.
MISSING_REPLICA_PATIENCE_S = 60.0
MAX_REPLICAS = 4096

_log = logging.getLogger(__name__)


class MetaStore(Protocol):
    """Small texts that survive a restart."""

    def meta(self, key: str) -> str | None:
        """The text, None when there is none."""
        ...


@dataclass(frozen=True, slots=True)
class ResidencySettings:
    """Settings of a deployment or an operator, kept over a restart."""

    options: ResidencyOptions
    latency_per_s: float  # weights of the goals, in quality points
    energy_per_j: float


# The former build wrote version 1 without name and version in front.
SETTINGS: RecordFormat[ResidencySettings] = RecordFormat(
    "residency_settings", 1, ResidencySettings, bare=1
)


@dataclass(slots=True)
class _RouterDemand:
    """The last report of one router: SLM -> requests."""

    received_at: float
    queued: dict[str, int] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)


class ResidencyCoordinator:
    """The residency of one application. Used on one event loop; every method returns at once.

    Args:
        store: keeps the settings over a restart.
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
        self._routers: dict[str, _RouterDemand] = {}
        self._replicas = ObservedReplicas()
        self._desired: dict[str, Residency] = {}  # as published
        self._wait_s: dict[str, float] = {}
        self._planned_at: dict[str, float] = {}  # SLM -> when its wake-up was first planned
        self._measured_wake_s: dict[str, Ewma] = {}
        self._engine_wake_s: dict[str, float] = {}  # of the last wake-up, in the engine alone
        self._hits = self._misses = self._peak_bytes = 0
        self._budget_reached = self._published = False
        now = clock()
        self._recent = (DecayedRate(RECENT_S, now), DecayedRate(RECENT_S, now))
        self._no_plan_until = now
        if text := store.meta(RESIDENCY_KEY):
            self._restore(text)
            # Replicas are as they were before the restart. Wait for their reports before any plan.
            self._no_plan_until = now + RESTART_PATIENCE_S

    def configure(
        self, options: ResidencyOptions, latency_per_s: float, energy_per_j: float
    ) -> str:
        """Take settings from a deployment or an operator; return the text to store for a restart.

        Counts of hits, swaps and bytes start anew. The weights are the goals': quality points per
        second and per joule.
        """
        settings = ResidencySettings(options, latency_per_s, energy_per_j)
        self._hits = self._misses = self._peak_bytes = 0
        self._budget_reached = False
        self._apply(settings)
        self._no_plan_until = self._clock()
        self.step()
        return SETTINGS.encode(settings).decode()

    def set_slms(self, specs: Iterable[SLMSpec]) -> None:
        """Follow SLMs that joined or left; remote ones take no memory here."""
        self._specs = {s.id: s for s in specs if s.locality == "local"}
        self.step()

    def report_demand(self, router_id: str, report: DemandReport) -> DemandReply:
        """Take a router's report; `router_id` names the router process."""
        now = self._clock()
        while len(self._routers) >= MAX_ROUTERS and router_id not in self._routers:
            self._routers.pop(min(self._routers, key=lambda r: self._routers[r].received_at))
        self._routers[router_id] = _RouterDemand(now, dict(report.queued), dict(report.running))
        for slm_id, replicas in report.replicas.items():
            for replica_id, node in replicas.items():
                self._replicas.listed(slm_id, replica_id, node, now)
        self._hits += report.hits
        self._misses += report.misses
        for rate, count in zip(self._recent, (report.hits, report.misses), strict=True):
            rate.add(count, now)
        self.step(report.arrivals)
        return DemandReply(dict(self._wait_s), self.summary())

    def report(self, slm_id: str, replica_id: str, state: str, times: Mapping[str, float]) -> None:
        """Take a replica's report of its state; `times` may have the seconds of its "wake"."""
        now = self._clock()
        observed = self._replicas.reported(slm_id, replica_id, state, now)
        if "wake" in times:  # absent at its first start
            self._engine_wake_s[slm_id] = times["wake"]
            if observed is Residency.HOT and (since := self._planned_at.pop(slm_id, None)):
                mean = self._measured_wake_s.setdefault(slm_id, Ewma(WAKE_HALF_LIFE_S))
                mean.add(now - since, now)
        self.step()

    def step(self, arrivals: Iterable[str] = ()) -> None:
        """Plan, and publish what can be published now. `arrivals` are preferred SLMs, in order."""
        if self._planner is None or not self._specs:
            return
        now = self._clock()
        self._forget_silent(now)
        footprints = [self._footprint(s, now) for s in self._specs.values()]
        self._track_peak(hot_bytes(footprints))
        if now < self._no_plan_until and not self._all_reported():
            return
        plan = self._planner.step(now, Demand(tuple(arrivals), self._queued()), footprints)
        self._wait_s = dict(plan.wait_s)
        for slm_id in plan.wake_order:
            self._planned_at.setdefault(slm_id, now)
        for slm_id in set(self._planned_at) - set(plan.wake_order):
            del self._planned_at[slm_id]
        desired = within_budget(plan, footprints, self._desired, self._budget_bytes)
        if desired != self._desired or not self._published:
            self._desired = desired
            self._publish_desired()

    def summary(self) -> ResidencySummary | None:
        """Budget, bytes, swaps and hits, for people; None without a budget."""
        if self._planner is None:
            return None
        now = self._clock()
        hits, misses = (rate.per_s(now) for rate in self._recent)
        footprints = [self._footprint(s, now) for s in self._specs.values()]
        return ResidencySummary(
            policy=str(self._options.policy),
            budget_bytes=self._budget_bytes,
            hot_bytes=hot_bytes(footprints),
            peak_bytes=self._peak_bytes,
            swaps=self._planner.swaps,
            hits=self._hits,
            misses=self._misses,
            hit_ratio=_ratio(self._hits, self._misses),
            recent_hit_ratio=_ratio(hits, misses),
            queued_requests=sum(self._queued().values()),
        )

    def _restore(self, text: str) -> None:
        try:
            self._apply(SETTINGS.decode(text))
        except KnowledgeError as error:  # the text stays in the store until the next `configure`
            _log.error("stored %r ignored: %s", RESIDENCY_KEY, error.message)

    def _apply(self, settings: ResidencySettings) -> None:
        self._options = settings.options
        had_budget = self._planner is not None
        self._planner, self._published = None, False
        if self._options.memory_budget_bytes is not None:
            self._planner = build(
                self._options,
                latency_per_s=settings.latency_per_s,
                energy_per_j=settings.energy_per_j,
            )
        elif had_budget:
            self._desired, self._wait_s = {}, {}
            self._publish_desired()  # empty: every SLM is to be hot again

    def _publish_desired(self) -> None:
        self._publish(DesiredResidency(dict(self._desired), self._options))
        self._published = True

    def _track_peak(self, used_bytes: int) -> None:
        # The peak counts from the time at which the budget was first kept. Before that (at a start,
        # or after the budget was set or lowered) replicas are awake that still have to fall asleep.
        if self._replicas.settled and used_bytes <= self._budget_bytes and self._all_reported():
            self._budget_reached = True
        if self._budget_reached:
            self._peak_bytes = max(self._peak_bytes, used_bytes)

    @property
    def _budget_bytes(self) -> int:
        return int(self._options.memory_budget_bytes or 0)

    def _forget_silent(self, now: float) -> None:
        """Drop routers that stopped reporting, and replicas that routers no longer list."""
        for router_id in [
            i for i, r in self._routers.items() if now - r.received_at > ROUTER_EXPIRY_S
        ]:
            del self._routers[router_id]
        if not self._routers:
            return  # no router lists any replica
        self._replicas.forget(max(r.received_at for r in self._routers.values()))

    def _all_reported(self) -> bool:
        reporting = self._replicas.reporting_slms
        return all(s.id in reporting for s in self._specs.values() if s.residency != "on_demand")

    def _footprint(self, spec: SLMSpec, now: float) -> ModelFootprint:
        observed = self._replicas.residency(spec, now)
        priors = spec.priors
        return ModelFootprint(
            spec.id,
            self._replicas.bytes_by_node(spec),
            observed=observed,
            wake_s=priors.wake_s if observed is Residency.COLD else self._wake_s(spec.id),
            wake_j=self._engine_wake_s.get(spec.id, FIRST_WAKE_S)
            * spec.resources.threads
            * DEFAULT_WATTS_PER_CORE,
            answer_s=priors.ttft_s + priors.tpot_s * priors.output_tokens,
            pinned=spec.residency == "pinned",
            may_go_cold=spec.residency == "on_demand" and spec.scaling.min_replicas == 0,
            running=sum(r.running.get(spec.id, 0) for r in self._routers.values()),
        )

    def _wake_s(self, slm_id: str) -> float:
        """Mean from plan to report; while nothing was measured, the mean of the other SLMs."""
        means = {i: e.mean for i, e in self._measured_wake_s.items() if e.mean is not None}
        if slm_id in means:
            return means[slm_id]
        return sum(means.values()) / len(means) if means else FIRST_WAKE_S

    def _queued(self) -> dict[str, int]:
        """SLM to requests queued for its wake-up, in all routers."""
        total: dict[str, int] = {}
        for router in self._routers.values():
            for slm_id, count in router.queued.items():
                total[slm_id] = total.get(slm_id, 0) + count
        return total


def _ratio(hits: float, misses: float) -> float | None:
    return hits / (hits + misses) if hits + misses > 0.0 else None


_TIER_OF_STATE = {
    "ready": Residency.HOT,
    "waking": Residency.STARTING,
    "importing": Residency.STARTING,  # takes its memory within seconds
    "starting engine": Residency.STARTING,
    "warming up": Residency.STARTING,
    "asleep": Residency.ASLEEP,
}
_SETTLED = (Residency.HOT, Residency.ASLEEP)
_MOST_MEMORY_FIRST = (Residency.HOT, Residency.STARTING, Residency.ASLEEP)


@dataclass(slots=True)
class _Replica:
    slm_id: str
    observed: Residency
    reported_at: float
    has_reported: bool = False
    listed_at: float | None = None  # by a router
    node: str = ""


class ObservedReplicas:
    """Every replica of the fleet: what it reported, and which routers list it on which node."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._forgotten: dict[str, _Replica] = {}  # a router that restarts may list them again
        self._missing_since: dict[str, float] = {}  # SLM with fewer replicas than min_replicas

    def listed(self, slm_id: str, replica_id: str, node: str, now: float) -> None:
        """Take in that a router lists the replica; until it reports, it counts as hot."""
        replica = self._of(slm_id, replica_id, Residency.HOT, now)
        replica.listed_at, replica.node = now, node

    def reported(self, slm_id: str, replica_id: str, state: str, now: float) -> Residency:
        """The replica reports a state; returns its tier, COLD for a state that takes no memory."""
        replica = self._of(slm_id, replica_id, Residency.COLD, now)
        replica.observed = _TIER_OF_STATE.get(state, Residency.COLD)
        replica.has_reported, replica.reported_at = True, now
        return replica.observed

    def forget(self, last_list_at: float) -> None:
        """Drop replicas missing from recent lists; `last_list_at` is when the newest came."""
        for replica_id, replica in list(self._replicas.items()):
            last_at, patience_s = replica.listed_at, GONE_AFTER_S
            if last_at is None:  # it is starting, or died before a router listed it
                last_at = replica.reported_at
                is_ready = replica.observed in _SETTLED
                patience_s = READY_PATIENCE_S if is_ready else START_PATIENCE_S
            if last_list_at - last_at > patience_s:
                _drop_oldest(self._forgotten)
                self._forgotten[replica_id] = self._replicas.pop(replica_id)

    @property
    def reporting_slms(self) -> set[str]:
        """SLMs of which a replica has reported."""
        return {r.slm_id for r in self._replicas.values() if r.has_reported}

    @property
    def settled(self) -> bool:
        """Whether no replica is on its way to another tier."""
        return all(r.observed in _SETTLED for r in self._replicas.values())

    def residency(self, spec: SLMSpec, now: float) -> Residency:
        """The SLM's observed residency: that of its replica that takes most memory.

        Serve starts what is missing of `min_replicas`, so a missing replica counts as starting.
        """
        tiers = {r.observed for r in self._replicas.values() if r.slm_id == spec.id}
        if self._count(spec) >= spec.scaling.min_replicas:
            self._missing_since.pop(spec.id, None)
        elif now - self._missing_since.setdefault(spec.id, now) < MISSING_REPLICA_PATIENCE_S:
            tiers.add(Residency.STARTING)
        return next((t for t in _MOST_MEMORY_FIRST if t in tiers), Residency.COLD)

    def bytes_by_node(self, spec: SLMSpec) -> dict[str, int]:
        """Declared bytes of the SLM's replicas while they are hot."""
        nodes: dict[str, int] = {}
        unplaced = max(self._count(spec), spec.scaling.min_replicas, 1)
        for replica in self._not_failed(spec):
            if replica.node:
                nodes[replica.node] = nodes.get(replica.node, 0) + spec.declared_bytes
                unplaced -= 1
        # The node of a replica that has yet to start is unknown, so it counts on every known node.
        known = {r.node for r in self._replicas.values() if r.node} or {""}
        for node in known if unplaced else ():
            nodes[node] = nodes.get(node, 0) + unplaced * spec.declared_bytes
        return nodes

    def _count(self, spec: SLMSpec) -> int:
        return len(self._not_failed(spec))

    def _not_failed(self, spec: SLMSpec) -> list[_Replica]:
        replicas = self._replicas.values()
        return [r for r in replicas if r.slm_id == spec.id and r.observed is not Residency.COLD]

    def _of(self, slm_id: str, replica_id: str, assumed: Residency, now: float) -> _Replica:
        replica = self._replicas.get(replica_id)
        if replica is None:
            _drop_oldest(self._replicas)
            replica = self._forgotten.pop(replica_id, None) or _Replica(slm_id, assumed, now)
            self._replicas[replica_id] = replica
        return replica


def _drop_oldest(replicas: dict[str, _Replica]) -> None:
    if len(replicas) >= MAX_REPLICAS:
        del replicas[next(iter(replicas))]


def hot_bytes(footprints: Iterable[ModelFootprint]) -> int:
    """Declared bytes in memory, on the fullest node."""
    nodes: dict[str, int] = {}
    for footprint in footprints:
        in_memory = footprint.observed in IN_MEMORY
        for node, size in footprint.bytes_by_node.items() if in_memory else ():
            nodes[node] = nodes.get(node, 0) + size
    return max(nodes.values(), default=0)
