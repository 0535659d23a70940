"""The router's own `/metrics` in Prometheus' text format, for scrapers that do not go through Ray.

Counters and histograms are those of one router process; the fleet gauges are the snapshot's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

from deployments.metric_table import METRICS, Kind, Metric
from deployments.metrics import Aggregates, HistogramState, fleet_samples

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render_fleet_metrics(aggregates: Aggregates, snapshot: Mapping[str, Any]) -> bytes:
    """Return the exposition of what was observed and of GET /v1/fleet's answer."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_FleetCollector(aggregates, snapshot))
    return generate_latest(registry)


class _FleetCollector(Collector):
    def __init__(self, aggregates: Aggregates, snapshot: Mapping[str, Any]) -> None:
        self._aggregates = aggregates
        self._snapshot = snapshot

    def describe(self) -> Iterator[Family]:
        # Registering would otherwise collect once, only to learn the names.
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
