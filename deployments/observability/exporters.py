"""Exporters: the router's metrics for Ray and for the text of `/metrics`.

Ray does not export `prometheus_client` metrics of a replica. So each value goes to Ray's own
metrics (node agents, Prometheus discovery, dashboards; names get the prefix `ray_`) and to
in-process aggregates, from which `render_fleet_metrics` renders `/metrics`.

Units are base units: seconds, joules, tokens, bytes. Every label has a fixed set of values; others
become "other", so no client can create new series.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from calm_serve.telemetry import DecayedRate
from calm_serve.types import DecisionPath, DecisionReason, Outcome, Residency
from calm_serve.upstreams import FAILURE_KINDS
from deployments.observability.catalogue import (
    BY_NAME,
    METRICS,
    Kind,
    Metric,
)
from deployments.observability.host import HostUsage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of the text of /metrics
OTHER = "other"
NONE = "none"  # no SLM was chosen
RATE_HALF_LIFE_S = 30.0  # of calm_requests_per_second

# Engines cache whole blocks and always recompute the last token, so a ratio of 1 does not occur.
FULL_HIT_RATIO = 0.9


# Gauge of an SLM -> key of the SLM in GET /v1/fleet.
_FLEET_GAUGES = {
    "calm_slm_replicas": "replicas",
    "calm_slm_target_replicas": "target_replicas",
    "calm_slm_running_requests": "running",
    "calm_slm_waiting_requests": "waiting",
    "calm_slm_capacity_requests": "capacity",
    "calm_slm_kv_usage_ratio": "kv_usage_ratio",
    "calm_slm_cached_prefix_ratio": "cached_prefix_ratio",
    "calm_slm_memory_bytes": "memory_bytes",
}
# Gauge of the fleet -> key of `residency` in GET /v1/fleet.
_RESIDENCY_GAUGES = {
    "calm_residency_budget_bytes": "budget_bytes",
    "calm_residency_hot_bytes": "hot_bytes",
    "calm_residency_swaps": "swaps",
    "calm_queued_requests": "queued_requests",
}
_PHASES = ("import", "engine", "warmup", "total")
SLM_ALARMS = ("quality", "tokens", "speed")
FLEET_ALARMS = ("prompt_mix", "calibration", "unfamiliar", "constant_selector")
# Label `against` of calm_choice_gain -> key of `choices` in GET /v1/fleet.
_GAINS = {"best_single": "gain_best_single", "share_matched": "gain_share_matched"}
_PATHS = frozenset(DecisionPath)
_REASONS = frozenset(DecisionReason)
_STATUSES = frozenset(("ok", "error", "cancelled", "rejected"))
_SOURCES = frozenset(("counter", "rapl", "estimate"))

Record = Callable[[float, dict[str, str]], None]
Sample = tuple[str, tuple[str, ...], float]  # metric name, label values, value


def ray_instrument(metric: Metric) -> Record:
    """Make the Ray metric for one row; inside a replica Serve adds its own tags."""
    from ray.serve import metrics  # takes 2 s, so not at the top

    labels: Any = metric.labels  # Ray's annotation allows one label only
    record: Record
    match metric.kind:
        case Kind.COUNTER:
            record = metrics.Counter(metric.name, metric.description, labels).inc
        case Kind.GAUGE:
            record = metrics.Gauge(metric.name, metric.description, labels).set
        case _:
            bounds = list(metric.buckets)
            record = metrics.Histogram(metric.name, metric.description, bounds, labels).observe
    return record


@dataclass(slots=True)
class HistogramState:
    """Counts per bucket (the last is above every bound) and the sum of all values."""

    counts: list[int]
    total: float = 0.0


@dataclass(slots=True)
class Aggregates:
    """The values of this process, by metric name and label values."""

    values: dict[str, dict[tuple[str, ...], float]] = field(default_factory=dict)
    histograms: dict[str, dict[tuple[str, ...], HistogramState]] = field(default_factory=dict)

    def record(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        """Add to a counter, set a gauge or count into a histogram."""
        if metric.kind is Kind.HISTOGRAM:
            series = self.histograms.setdefault(metric.name, {})
            state = series.get(labels)
            if state is None:
                state = series[labels] = HistogramState([0] * (len(metric.buckets) + 1))
            state.counts[bisect_left(metric.buckets, value)] += 1
            state.total += value
            return
        known = self.values.setdefault(metric.name, {})
        before = known.get(labels, 0.0) if metric.kind is Kind.COUNTER else 0.0
        known[labels] = before + value


class RouterMetrics:
    """Writes the metrics of the catalogue; one per router process, used from one event loop.

    Args:
        clock: monotonic seconds.
        slm_ids: the fleet until the first `refresh`; other ids are counted as "other".
        instrument: makes the exporting function of one metric (Ray's by default).
    """

    def __init__(
        self,
        clock: Callable[[], float],
        slm_ids: Iterable[str],
        instrument: Callable[[Metric], Record] = ray_instrument,
    ) -> None:
        self._clock = clock
        self._exporters = {metric.name: instrument(metric) for metric in METRICS}
        self._slm_ids: frozenset[str] = frozenset()
        self._rates: dict[str, DecayedRate] = {}
        self._follow(slm_ids)
        self.aggregates = Aggregates()

    def observe(self, outcome: Outcome) -> None:
        """Count one finished request: about 12 values, after the reply has been sent."""
        slm = _known(outcome.slm_id, self._slm_ids)
        path = _known(outcome.decision.path, _PATHS)
        split = (slm, path, cache_class(outcome), "cold" if outcome.timing.cold else "warm")
        reason, status = (
            _known(outcome.decision.reason, _REASONS),
            _known(outcome.status, _STATUSES),
        )
        self._rates[slm].add(1.0, self._clock())
        self._record("calm_requests", (*split, reason, status), 1.0)
        self._record("calm_retries", (slm,), outcome.retries)
        self._record("calm_decision_seconds", (slm, path), outcome.timing.decision_s)
        self._record("calm_prompt_tokens", split, outcome.engine.prompt_tokens)
        self._record("calm_cached_tokens", split, outcome.engine.cached_tokens)
        self._record("calm_output_tokens", split, outcome.engine.output_tokens)
        self._observe_failures(outcome)
        if outcome.engine.energy_j is not None:
            source = _known(outcome.engine.energy_source, _SOURCES)
            self._record("calm_energy_joules", (*split, source), outcome.engine.energy_j)
        if (hot := outcome.decision.preferred_hot) is not None:
            preferred = _known(outcome.decision.preferred, self._slm_ids)
            self._record("calm_residency_hits" if hot else "calm_residency_misses", (preferred,), 1)
        timings = {
            "calm_ttft_seconds": outcome.timing.ttft_s,
            "calm_tpot_seconds": outcome.timing.tpot_s,
            "calm_e2e_seconds": outcome.timing.e2e_s if outcome.status == "ok" else None,
            "calm_queue_seconds": outcome.engine.queue_s,
        }
        for name, value in timings.items():
            if value is not None:
                self._record(name, split, value)

    def refused(self, kind: str) -> None:
        """Count a request that was refused before anything was decided."""
        self._record("calm_refused_requests", (NONE, _known(kind, FAILURE_KINDS)), 1.0)

    def _observe_failures(self, outcome: Outcome) -> None:
        if outcome.failure in FAILURE_KINDS:  # not "cancelled" by the client, and no answer
            slm = _known(outcome.slm_id, self._slm_ids) if outcome.slm_id else NONE
            self._record("calm_refused_requests", (slm, outcome.failure), 1.0)
        answered = outcome.cost or 0.0  # by the SLM of the outcome, or its failure after content
        for attempt in outcome.failed_attempts:
            slm = _known(attempt.slm_id, self._slm_ids)
            kind = _known(attempt.failure, FAILURE_KINDS)
            self._record("calm_failed_attempts", (slm, kind), 1.0)
            if attempt.cost is not None:
                answered -= attempt.cost
                self._record("calm_cost", (slm, outcome.currency), attempt.cost)
        slm = _known(outcome.slm_id, self._slm_ids)
        self._record("calm_cost", (slm, outcome.currency), answered)

    def refresh(self, snapshot: Mapping[str, Any], host: HostUsage) -> None:
        """Set the gauges from GET /v1/fleet's answer and the host's usage; call once a second."""
        now = self._clock()
        self._follow(str(slm["id"]) for slm in snapshot["slms"])
        for slm, rate in self._rates.items():
            self._record("calm_requests_per_second", (slm,), rate.per_s(now))
        self._record("calm_host_cpu_ratio", (), host.cpu_ratio)
        self._record("calm_host_memory_used_bytes", (), host.memory_used_bytes)
        self._record("calm_host_memory_total_bytes", (), host.memory_total_bytes)
        for name, labels, value in fleet_samples(snapshot):
            # To Ray only: `/metrics` renders these from the snapshot of its own request.
            self._exporters[name](value, dict(zip(BY_NAME[name].labels, labels, strict=True)))

    def _follow(self, slm_ids: Iterable[str]) -> None:
        """Follow the SLMs of the fleet, which join and leave while it serves."""
        if (ids := frozenset(slm_ids)) == self._slm_ids and self._rates:
            return
        now, before = self._clock(), self._rates
        self._slm_ids = ids
        self._rates = {
            name: before.get(name) or DecayedRate(RATE_HALF_LIFE_S, now)
            for name in (*sorted(ids), OTHER)
        }

    def _record(self, name: str, labels: tuple[str, ...], value: float) -> None:
        metric = BY_NAME[name]
        if metric.kind is Kind.COUNTER and value <= 0:
            return  # Ray's counters raise on 0
        self.aggregates.record(metric, labels, value)
        self._exporters[name](value, dict(zip(metric.labels, labels, strict=True)))


def fleet_samples(snapshot: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield the fleet gauges of GET /v1/fleet's answer; a missing value yields nothing."""
    yield "calm_fleet_ready", (), float(bool(snapshot.get("ready")))
    if (in_work := snapshot.get("requests_in_work")) is not None:
        yield "calm_router_requests", (), float(in_work)
    yield from _goal_samples(snapshot.get("goals") or {})
    for slm in snapshot.get("slms", ()):
        slm_id = str(slm["id"])
        for tier in Residency:
            yield "calm_slm_state", (slm_id, tier.value), float(slm.get("state") == tier)
        for name, key in _FLEET_GAUGES.items():
            if (value := slm.get(key)) is not None:
                yield name, (slm_id,), float(value)
        starts = slm.get("ready_s") or {}
        for phase in _PHASES:
            if (value := starts.get(phase)) is not None:
                yield "calm_slm_start_seconds", (slm_id, phase), float(value)
    yield from monitor_samples(snapshot)
    yield from residency_samples(snapshot)


def _goal_samples(goals: Mapping[str, Any]) -> Iterator[Sample]:
    for kind, value in goals.get("weights", {}).items():
        if not kind.endswith("_after_s"):  # a threshold, not a weight
            yield "calm_weight", (str(kind),), float(value)
    for target in goals.get("targets", ()):
        label = (str(target["name"]),)
        yield "calm_goal_target", label, float(target["target"])
        for name, key in (("calm_goal_measured", "measured"), ("calm_goal_held", "held")):
            if (value := target[key]) is not None:
                yield name, label, float(value)


def cache_class(outcome: Outcome) -> str:
    """Return "none", "partial" or "full": how much of the prompt was in the prefix cache."""
    if outcome.engine.cached_tokens <= 0 or outcome.engine.prompt_tokens <= 0:
        return "none"
    hit_ratio = outcome.engine.cached_tokens / outcome.engine.prompt_tokens
    return "full" if hit_ratio >= FULL_HIT_RATIO else "partial"


def _known(value: str, known: frozenset[Any]) -> str:
    return value if value in known else OTHER


def render_fleet_metrics(aggregates: Aggregates, snapshot: Mapping[str, Any]) -> bytes:
    """Return the text of /metrics, from the aggregates and the document of GET /v1/fleet."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_FleetCollector(aggregates, snapshot))
    return generate_latest(registry)


class _FleetCollector(Collector):
    def __init__(self, aggregates: Aggregates, snapshot: Mapping[str, Any]) -> None:
        self._aggregates = aggregates
        self._snapshot = snapshot

    def describe(self) -> Iterator[Family]:
        # Without this method, registering would call `collect` to get the names.
        return iter(())

    def collect(self) -> Iterator[Family]:
        fleet: dict[str, dict[tuple[str, ...], float]] = {}
        for name, labels, value in fleet_samples(self._snapshot):
            fleet.setdefault(name, {})[labels] = value
        for metric in METRICS:
            if metric.kind is Kind.HISTOGRAM:
                yield _histogram(metric, self._aggregates.histograms.get(metric.name, {}))
            else:
                values = self._aggregates.values.get(metric.name) or fleet.get(metric.name, {})
                yield _plain(metric, values)
        if version := (self._snapshot.get("predictor") or {}).get("version"):
            info = InfoMetricFamily("calm_predictor", "The predictor that decides now.")
            info.add_metric((), {"version": str(version)})
            yield info


def _plain(metric: Metric, values: Mapping[tuple[str, ...], float]) -> Family:
    made = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    family = made(metric.name, metric.description, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histogram(metric: Metric, states: Mapping[tuple[str, ...], HistogramState]) -> Family:
    family = HistogramMetricFamily(metric.name, metric.description, labels=metric.labels)
    bounds = [*(repr(float(bound)) for bound in metric.buckets), "+Inf"]
    for labels, state in states.items():
        buckets = list(zip(bounds, accumulate(state.counts), strict=True))
        family.add_metric(labels, buckets, state.total)
    return family


def monitor_samples(snapshot: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield the gauges; a missing value yields nothing, an alarm that is off yields 0."""
    on = {(a["kind"], a["slm"]) for a in snapshot.get("alarms", ())}
    for kind in FLEET_ALARMS:
        yield "calm_alarm", (kind, ""), float((kind, "") in on)
    choices = snapshot.get("choices") or {}
    if (error := choices.get("calibration_error")) is not None:
        yield "calm_calibration_error_ratio", (), float(error)
    if (unfamiliar := choices.get("unfamiliar_ratio")) is not None:
        yield "calm_unfamiliar_ratio", (), float(unfamiliar)
    if (entropy := choices.get("entropy_ratio")) is not None:
        yield "calm_choice_entropy_ratio", (), float(entropy)
        for against, key in _GAINS.items():
            yield "calm_choice_gain", (against,), float(choices[key])
    for slm in snapshot.get("slms", ()):
        slm_id = str(slm["id"])
        for kind in SLM_ALARMS:
            yield "calm_alarm", (kind, slm_id), float((kind, slm_id) in on)
        yield from _slm_samples(slm_id, slm)


def _slm_samples(slm_id: str, slm: Mapping[str, Any]) -> Iterator[Sample]:
    if (factor := slm.get("calibration_factor")) is not None:
        yield "calm_slm_calibration_factor", (slm_id,), float(factor)
    energy = slm.get("energy") or {}
    if energy:
        yield "calm_energy_idle_joules", (slm_id, str(energy["source"])), float(energy["idle_j"])
    if (error := energy.get("attribution_error_ratio")) is not None:
        yield "calm_energy_attribution_error_ratio", (slm_id,), float(error)


def residency_samples(snapshot: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield the gauges; nothing of the fleet's without a memory budget."""
    residency = snapshot.get("residency") or {}
    for name, key in _RESIDENCY_GAUGES.items():
        if (value := residency.get(key)) is not None:
            yield name, (), float(value)
    for slm in snapshot.get("slms", ()):
        if (wake_s := slm.get("wake_s")) is not None:
            yield "calm_slm_wake_seconds", (str(slm["id"]),), float(wake_s)
