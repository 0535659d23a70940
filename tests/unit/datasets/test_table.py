"""The format of score tables, and what the reader says about lines that break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.datasets.table import TEST_RATIO, TableRow, read_table, row_of, table_of
from calm_serve.errors import ConfigError
from tests.score_tables import make_rows, write_rows

ROW: dict[str, Any] = {"prompt": "hi", "scores": {"a": 1, "b": 0.25}}


def read(tmp_path: Path, *rows: Any) -> Any:
    return read_table(write_rows(tmp_path / "t.jsonl", list(rows)))


def test_a_row_needs_only_a_prompt_and_scores(tmp_path: Path) -> None:
    table = read(tmp_path, ROW, ROW | {"prompt": "ho", "scores": {"b": 1, "a": 0}})
    assert table.models == ("a", "b")
    assert table.scores.tolist() == [[1.0, 0.25], [0.0, 1.0]]
    assert (table.costs, table.latencies_s, table.tasks) == (None, None, None)


def test_costs_latencies_tasks_and_splits_are_read(tmp_path: Path) -> None:
    more = {"costs": {"a": 3, "b": 0}, "latencies_s": {"a": 0.5, "b": 0.1}, "task": "chat"}
    table = read(
        tmp_path, ROW | more | {"split": "test"}, ROW | more | {"prompt": "x", "split": "train"}
    )
    assert table.costs.tolist() == [[3.0, 0.0]] * 2
    assert table.latencies_s.tolist() == [[0.5, 0.1]] * 2
    assert table.tasks == ("chat", "chat")
    assert [row.prompt for row in table.test.rows] == ["hi"]
    assert [row.prompt for row in table.train.rows] == ["x"]


def test_messages_stand_for_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    row = {"messages": messages, "scores": {"a": 1}}
    assert read(tmp_path, row).rows[0].body() == {"messages": messages}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "line 2: scores: Field required"),
        (ROW | {"scores": {}}, "line 2: scores: Dictionary should have at least 1 item"),
        (ROW | {"scores": {"a": 1, "b": 1.5}}, "line 2: scores.b: Input should be less than"),
        (ROW | {"scores": {"a": 1, "b": -1}}, "line 2: scores.b: Input should be greater than"),
        (ROW | {"scores": {"a": 1, "b": "1"}}, "line 2: scores.b: Input should be a valid number"),
        (ROW | {"scores": {"a": 1, "b": True}}, "line 2: scores.b: Input should be a valid number"),
        (ROW | {"scores": {"a": 1}}, "line 2: scores: 'b' is missing"),
        (ROW | {"scores": {"a": 1, "b": 1, "c": 1}}, "line 2: scores: 'c' is not among the models"),
        (ROW | {"costs": {"a": 1}}, "line 2: costs: 'b' is missing"),
        (ROW | {"costs": {"a": 1, "b": -1}}, "line 2: costs.b: Input should be greater than"),
        (ROW | {"costs": {"a": 1, "b": 2}}, "line 2: costs: line 1 has none"),
        (ROW | {"task": "chat"}, "line 2: task: line 1 has none"),
        (ROW | {"split": "dev"}, "line 2: split: Input should be 'train' or 'test'"),
        (ROW | {"prompt": ""}, "line 2: prompt: String should have at least 1 character"),
        ({"scores": {"a": 1, "b": 0}}, "exactly one of `prompt` and `messages`"),
        (ROW | {"messages": [{"role": "user", "content": "x"}]}, "exactly one of"),
        ({"messages": [{"role": 1}], "scores": {"a": 1, "b": 0}}, "messages"),
        (ROW | {"socres": {}}, "line 2: unknown key 'socres'; the nearest valid key is 'scores'"),
        ([1], "line 2: expected an object"),
    ],
)
def test_an_error_names_the_line_and_the_field(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, ROW, row)
    assert caught.value.message.startswith("t.jsonl: line 2: ")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["{", "", "nan", '{"prompt": "x", "scores": {"a": NaN}}'])
def test_a_line_that_is_not_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{text}\n{json.dumps(ROW)}\n")
    with pytest.raises(ConfigError, match=r"t.jsonl: line 2: (not JSON|scores.a: )"):
        read_table(path)


def test_a_missing_file_and_an_empty_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="there is no row"):
        read(tmp_path)


def test_a_prompt_that_is_learned_from_is_not_tested_on(tmp_path: Path) -> None:
    same = {"messages": [{"role": "user", "content": "hi"}], "scores": ROW["scores"]}
    with pytest.raises(ConfigError, match="line 2: split: the same prompt is in line 1 with split"):
        read(tmp_path, ROW | {"split": "train"}, same | {"split": "test"})


def test_a_table_with_one_side_only_says_which_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split: no line has 'test'"):
        read(tmp_path, ROW | {"split": "train"})


def test_without_splits_a_share_of_the_prompts_is_for_the_test_whatever_else_is_there() -> None:
    rows = [TableRow.model_validate(row) for row in make_rows(2000)]
    whole, half = table_of(rows), table_of(rows[:1000])
    assert abs(whole.tests.mean() - TEST_RATIO) < 0.04
    assert np.array_equal(half.tests, whole.tests[:1000])


def test_a_part_keeps_rows_and_arrays_together() -> None:
    rows = [TableRow.model_validate(row | {"costs": row["scores"]}) for row in make_rows(9)]
    part = table_of(rows).part([7, 2])
    assert part.rows == (rows[7], rows[2])
    assert part.tasks == (rows[7].task, rows[2].task)
    assert part.costs is not None
    assert np.array_equal(part.costs, part.scores)
    assert part.scores[1].tolist() == [rows[2].scores[model] for model in part.models]


_amounts = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.floats(0, 1), min_size=1)


@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    _amounts,
    st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=9),
    st.sampled_from([None, "train", "test"]),
)
def test_a_written_line_reads_back(
    prompt: str, scores: dict[str, float], task: str | None, split: Any
) -> None:
    row = TableRow(prompt=prompt, scores=scores, task=task, split=split)
    line = row.line()
    assert line.count("\n") == 1
    assert row_of(line.encode(), TableRow, "line 1") == row
