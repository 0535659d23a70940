"""The dozen figures that the reference fleet is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from load_tests.fleet.summary import OWN_SLICES, SCORES, summary


def measured() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for part in (*OWN_SLICES, *(p for parts in SCORES.values() for p in parts)):
        slice_ = part.rpartition(".")[0]
        for name in (slice_, f"general.{slice_.partition('.')[2]}"):
            figures |= {f"{name}.n": 100, f"{name}.exact": 0.8, f"{name}.template": 0.8}
    for i, slm in enumerate(("extract", "sql", "shell", "reason", "intent", "general")):
        figures[f"{slm}.cost.tpot_ms"] = 1.0 + i
    figures |= {"extract:flat.adapter.flat.n": 50, "extract:flat.adapter.flat.exact": 0.7}
    figures |= {"extract.adapter.flat.n": 50, "extract.adapter.flat.exact": 0.1}
    return figures


def test_slices_are_pooled_by_their_size(tmp_path: Path) -> None:
    figures = measured() | {"reason.reason.1_step.n": 300, "reason.reason.1_step.exact": 1.0}
    found = summary(figures, tmp_path, ["flat"])
    assert found["reason_accuracy_1_2_steps"] == 0.95
    low, high = found["reason_accuracy_1_2_steps_ci95"]
    assert low < 0.95 < high


def test_the_worst_gap_names_its_slice_and_is_positive_where_the_generalist_is_behind(
    tmp_path: Path,
) -> None:
    figures = measured() | {"general.sql.advising.exact": 0.5, "general.sql.wikisql.exact": 1.0}
    found = summary(figures, tmp_path, ["flat"])
    assert found["general_worst_gap"] == pytest.approx(0.3)
    assert found["general_worst_gap_slice"] == "sql.sql.advising.exact"
    low, high = found["general_worst_gap_ci95"]
    assert 0.1 < low < 0.3 < high < 0.5


def test_cost_gain_and_weights(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x" * 1_500_000)
    found = summary(measured(), tmp_path, ["flat"])
    assert (found["general_cost_ratio"], found["general_cost_ratio_least"]) == (2.0, 1.2)
    assert found["adapter_gain"] == pytest.approx(0.6)
    assert found["weights_mb"] == 1.5
