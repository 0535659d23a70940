"""Names of the series that Prometheus gets of a metric."""

from __future__ import annotations

from deployments.observability.catalogue import Kind, Metric


def series_of(metric: Metric) -> tuple[str, ...]:
    """The names under which a metric is exported, without Ray's prefix."""
    match metric.kind:
        case Kind.COUNTER:
            return (f"{metric.name}_total",)
        case Kind.HISTOGRAM:
            return tuple(f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))
        case _:
            return (metric.name,)
