"""RouteLLM's files as score tables, and what the benchmark measures on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from load_tests.routing import routellm, tables

WEAK, STRONG = routellm.MODELS  # names in the tables
COLUMNS = ["prompt", *routellm.MODELS.values()]


def write_csv(path: Path, rows: list[tuple[str, bool, bool]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = Random(1)
    hard = [f"Prove that every group of order {i} is abelian" for i in range(60)]
    easy = [f"Is a cat an animal, yes or no, round {i}?" for i in range(60)]
    rows = [(p, random.random() < 0.1, True) for p in hard] + [(p, True, True) for p in easy]
    write_csv(tmp_path / "mmlu" / "responses" / "mmlu_algebra.csv", rows[:60])
    write_csv(tmp_path / "mmlu" / "responses" / "mmlu_biology.csv", rows[60:])
    write_lines(tmp_path / "mmlu" / "contaminated_prompts.jsonl", [{"eval_prompt": hard[0]}])
    questions = [
        {"question_id": i, "category": "writing", "turns": [f"first {i}", f"second {i}"]}
        for i in range(3)
    ]
    grades = [
        {"question_id": i, "model": model, "turn": turn, "score": 2 * turn + i}
        for i in range(3)
        for model in routellm.MODELS.values()
        for turn in (1, 2)
    ]
    write_lines(tmp_path / "mt_bench" / "question.jsonl", questions)
    write_lines(tmp_path / "mt_bench" / "judgements.jsonl", grades)
    write_lines(tmp_path / "mt_bench" / "contaminated_prompts.jsonl", [{"eval_prompt": "second 1"}])
    return tmp_path


def test_a_table_has_the_prompts_that_are_not_contaminated(folder: Path) -> None:
    table = routellm.read(folder, "mmlu")
    assert len(table.rows) == 119
    assert set(table.tasks or ()) == {"algebra", "biology"}
    assert table.rows[-1].scores == {WEAK: 1.0, STRONG: 1.0}


def test_a_score_of_mt_bench_is_the_mean_of_both_turns(folder: Path) -> None:
    table = routellm.read(folder, "mt_bench")
    assert [row.prompt for row in table.rows] == ["first 0", "first 2"]
    assert table.rows[1].scores == {WEAK: pytest.approx(0.5), STRONG: pytest.approx(0.5)}


def test_hard_prompts_go_to_the_stronger_model_first(folder: Path) -> None:
    found = tables.in_domain(tables.read(folder, "mmlu"), labels=60, seeds=2)
    assert (found["labels"], found["test_prompts"]) == (60, 59)
    assert found["apgr"] > 0.65
    assert found["cpt80"] < 50.0
    assert found["apgr_sd"] >= 0.0


def test_labels_of_one_table_are_measured_on_all_prompts_of_another(folder: Path) -> None:
    benchmark = tables.read(folder, "mmlu")
    found = tables.transfer({"mmlu": benchmark}, benchmark)
    assert (found["labels"], found["test_prompts"]) == (119, 119)
    low, high = found["apgr_ci95"]
    assert low <= found["apgr"] <= high


def test_without_a_data_folder_there_are_no_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATA_DIR", raising=False)
    assert tables.data_folder() is None
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert tables.data_folder() is None
    (tmp_path / routellm.FOLDER).mkdir()
    assert tables.data_folder() == tmp_path / routellm.FOLDER
