"""The standard workload and the figures of the benchmarks."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from deployments.reference_fleet.corpora.phrasing import INSTRUCTIONS
from deployments.reference_fleet.grading.rows import load
from load_tests.common import report
from load_tests.common.client import Answer
from load_tests.common.workloads import request, standard
from load_tests.fleet import benchmark


def test_the_workload_is_the_same_every_time_and_another_with_another_seed() -> None:
    assert standard() == standard()
    assert standard() != standard(seed=1)


def test_half_of_the_workload_names_neither_task_nor_format() -> None:
    asked = standard()
    assert len(asked) >= 1000
    assert sum(not r.instructed for r in asked) > len(asked) / 2


def test_three_tasks_and_more_have_easy_and_hard_requests() -> None:
    counts = Counter((r.row.task, r.row.difficulty) for r in standard())
    both = [t for t in INSTRUCTIONS if min(counts[t, "easy"], counts[t, "hard"]) >= 30]
    assert len(both) >= 3


def test_no_predictor_was_fitted_on_the_workload() -> None:
    fitted = {
        row.prompt for name in ("extract", "sql", "odd") for row in load(name) if row.side == "fit"
    }
    assert not fitted & {r.row.prompt for r in standard()}


def test_an_instructed_request_keeps_its_prompt() -> None:
    row = load("sql")[0]
    asked = request(row, Random(0), instructed_ratio=1.0)
    assert asked.instructed
    assert row.prompt in asked.messages[0]["content"] != row.prompt


@pytest.mark.parametrize(("right", "n"), [(0, 10), (5, 10), (10, 10)])
def test_the_interval_holds_the_share(right: int, n: int) -> None:
    low, high = report.wilson(right, n)
    assert 0.0 <= low <= right / n <= high <= 1.0
    assert (
        report.wilson(right * 100, n * 100)[1] - report.wilson(right * 100, n * 100)[0] < high - low
    )


def test_a_report_says_what_it_was_measured_on(tmp_path: Path) -> None:
    report.write(tmp_path / "f.json", "fleet", {"limit": 1}, {"a.exact": 1.0})
    document = json.loads((tmp_path / "f.json").read_text())
    assert set(document) == {"benchmark", "machine", "config", "figures"}
    assert document["machine"]["cores"]


def _row_answer(text: str) -> benchmark.RowAnswer:
    row = next(r for r in load("reason") if r.slice == "1 step")
    return benchmark.RowAnswer(
        "reason", row, Answer(text or row.answers[0], "reason", "pinned", "d", 0.1, 9, 9)
    )


def test_scores_are_shares_with_intervals() -> None:
    figures = benchmark.scores([_row_answer(""), _row_answer("#### 123456")])
    assert figures["reason.reason.1_step.n"] == 2
    assert figures["reason.reason.1_step.exact"] == 0.5
    low, high = figures["reason.reason.1_step.exact_ci95"]
    assert low < 0.5 < high


def test_every_row_goes_to_its_specialist_and_to_the_generalist() -> None:
    pairs = benchmark.questions(["general"], limit=2)
    assert Counter(slm for slm, row in pairs if row.slice == "advising") == {"sql": 2, "general": 2}
    assert {slm for slm, row in pairs if row.task == "mixed"} == {*benchmark.SPECIALISTS, "general"}
    assert {slm for slm, row in pairs if row.task == "open"} == {"general"}


def test_adapter_rows_carry_answers_in_the_adapters_schema() -> None:
    rows = benchmark.adapter_rows("music", limit=5)
    assert all(set(json.loads(r.answers[0])) == {"action", "music"} for r in rows)
