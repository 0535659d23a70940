"""The dashboard queries only series and labels that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deployments.observability.catalogue import METRICS
from tests.exported_series import series_of

PATH = Path(__file__).parents[4] / "deployments" / "observability" / "grafana" / "calm_serve.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text())
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
EXPRESSIONS = [t["expr"] for p in PANELS for t in p["targets"]]
LABELS = {f"ray_{series}": set(m.labels) for m in METRICS for series in series_of(m)}
SERVE_LABELS = {"deployment", "replica", "application"}  # Serve adds these in a replica


def names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_dashboard_has_what_grafana_needs_to_import_it() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["uid"]
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_used_exists_in_the_table(expression: str) -> None:
    assert names(expression)
    assert names(expression) <= LABELS.keys()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_label_used_belongs_to_every_metric_of_its_expression(expression: str) -> None:
    selectors = "".join(re.findall(r"\{([^}]*)\}", expression))
    used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selectors))
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        used |= {label.strip() for label in group.split(",")} - {"le"}
    for name in names(expression):
        assert used <= LABELS[name] | SERVE_LABELS


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legends_name_only_labels_their_query_keeps(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"]))))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept


def test_quantiles_are_taken_over_buckets_that_keep_their_bounds() -> None:
    quantiles = [e for e in EXPRESSIONS if "histogram_quantile" in e]
    assert quantiles
    for expression in quantiles:
        assert all(name.endswith("_bucket") for name in names(expression))
        assert re.search(r"by \(le\b", expression)


@pytest.mark.parametrize(
    "series",
    [
        "ray_calm_requests_total",
        "ray_calm_ttft_seconds_bucket",
        "ray_calm_tpot_seconds_bucket",
        "ray_calm_output_tokens_total",
        "ray_calm_energy_joules_total",
        "ray_calm_decision_seconds_bucket",
        "ray_calm_slm_replicas",
        "ray_calm_slm_waiting_requests",
    ],
)
def test_dashboard_shows_the_essentials(series: str) -> None:
    assert any(series in names(expression) for expression in EXPRESSIONS)
