"""Evaluation on tables of known truth: a router is found where there is one, and only there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calm_serve.datasets.evaluation import Evaluation, Evaluator, learning_sizes, prompts_needed
from calm_serve.datasets.plots import draw
from calm_serve.datasets.table import TableRow, table_of
from calm_serve.errors import ConfigError
from calm_serve.testing import FakeClock
from tests.score_tables import make_rows


def evaluate(rows: list[dict[str, Any]]) -> Evaluation:
    table = table_of([TableRow.model_validate(row) for row in rows])
    return Evaluator(table, FakeClock()).run(lambda done, total: None)


def two_models(rows: list[dict[str, Any]], **extra: Any) -> list[dict[str, Any]]:
    """The same rows with a strong model that is right everywhere, and one right on poems only."""
    return [
        row | {"scores": {"large": 1.0, "small": float(row["task"] == "poet")}} | extra
        for row in rows
    ]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return evaluate(make_rows(480)).figures


def test_the_router_finds_the_model_of_each_subject(figures: dict[str, Any]) -> None:
    assert figures["router_score"] > 0.75
    assert figures["router_score"] == pytest.approx(figures["task_best_score"], abs=0.06)
    assert figures["router_minus_best_single_ci95"][0] > 0.3
    assert figures["router_minus_share_matched_ci95"][0] > 0.3
    assert figures["oracle_score"] >= figures["router_score"]
    assert figures["random_score"] == pytest.approx(0.37, abs=0.06)
    assert sum(figures["router_shares"].values()) == pytest.approx(1.0)


def test_every_score_lies_in_its_interval(figures: dict[str, Any]) -> None:
    for policy in ("router", "best_single", "share_matched", "task_best", "oracle"):
        low, high = figures[f"{policy}_score_ci95"]
        assert low <= figures[f"{policy}_score"] <= high
        assert high - low < 0.25


def test_few_prompts_are_enough_where_the_subject_decides(figures: dict[str, Any]) -> None:
    points = figures["learning_curve"]
    assert [p["prompts"] for p in points] == learning_sizes(figures["train_prompts"])
    assert points[-1]["router_score"] == figures["router_score"]
    assert figures["prompts_needed"] <= 200


def test_the_measures_of_two_models_are_absent_for_three(figures: dict[str, Any]) -> None:
    assert figures["apgr"] is None
    assert figures["curve"] is None  # nothing says what a model costs


def test_random_scores_give_no_router() -> None:
    random = np.random.default_rng(3)
    rows = [
        {"prompt": f"{r['prompt']}", "scores": {m: float(random.random() < 0.5) for m in "ab"}}
        for r in make_rows(480)
    ]
    found = evaluate(rows).figures
    assert found["router_minus_best_single_ci95"][0] <= 0.0
    assert found["prompts_needed"] is None
    assert found["task_best_score"] is None


def test_two_models_have_a_curve_from_one_to_the_other() -> None:
    found = evaluate(two_models(make_rows(300)))
    figures = found.figures
    assert figures["apgr"] > 0.6  # all there is: a third of the prompts gains nothing
    assert figures["apgr_ci95"][0] < figures["apgr"] < figures["apgr_ci95"][1]
    assert figures["cpt50"] < 45.0
    assert figures["cpt80"] < 65.0
    assert figures["cost"] == "percent_to_stronger"
    (x0, y0), *_, (x1, y1) = figures["curve"]
    assert (x0, x1) == (0.0, pytest.approx(100.0))
    assert (y1, y0) == (1.0, pytest.approx(1 / 3, abs=0.12))


def test_costs_make_the_curve_and_are_reported_for_each_policy() -> None:
    rows = two_models(make_rows(300), costs={"large": 10.0, "small": 1.0})
    figures = evaluate(rows).figures
    assert figures["cost"] == "cost"
    assert figures["best_single_cost"] == 10.0
    assert figures["oracle_cost"] < 8.0  # the small one where both are right
    assert figures["curve"][0][0] == 1.0


def test_latencies_are_the_cost_of_a_table_without_costs() -> None:
    rows = [row | {"latencies_s": dict.fromkeys(row["scores"], 0.5)} for row in make_rows(160)]
    figures = evaluate(rows).figures
    assert figures["cost"] == "latency_s"
    assert figures["router_latency_s"] == pytest.approx(0.5)


def test_the_figures_are_json_and_the_picture_is_drawn(tmp_path: Path) -> None:
    for number, rows in enumerate((make_rows(120), two_models(make_rows(120)))):
        found = evaluate(rows)
        json.dumps(found.figures, allow_nan=False)
        picture = tmp_path / f"{number}.svg"
        draw(found, picture)
        text = picture.read_text()
        assert text.startswith("<?xml")
    with pytest.raises(ConfigError, match="--plot"):
        draw(found, tmp_path / "picture.unknown")


def test_too_short_tables_and_one_model_are_errors() -> None:
    with pytest.raises(ConfigError, match="to test on"):
        evaluate(make_rows(30))
    with pytest.raises(ConfigError, match="to learn from"):
        evaluate([r | {"split": "test" if i > 5 else "train"} for i, r in enumerate(make_rows(60))])
    with pytest.raises(ConfigError, match="nothing to choose"):
        evaluate([r | {"scores": {"only": 1.0}} for r in make_rows(60)])


def test_prompts_are_needed_from_the_first_size_after_which_all_intervals_are_above_zero() -> None:
    def point(prompts: int, low: float) -> dict[str, Any]:
        return {"prompts": prompts, "router_minus_best_single_ci95": [low, 1.0]}

    assert prompts_needed([point(40, 0.1), point(80, -0.1), point(160, 0.1)]) == 160
    assert prompts_needed([point(40, 0.1), point(80, 0.1)]) == 40
    assert prompts_needed([point(40, 0.1), point(80, 0.0)]) is None


def test_the_learning_curve_ends_with_all_prompts_and_starts_with_the_smallest_fit() -> None:
    assert learning_sizes(165) == [20, 41, 82, 165]
    assert learning_sizes(20) == [20]
