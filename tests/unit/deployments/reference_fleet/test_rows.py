"""The held-out rows that are in the repository."""

import json

import pytest

from deployments.reference_fleet.grading.rows import FILES, Row, load


@pytest.mark.parametrize("name", FILES)
def test_evaluation_rows_are_complete(name: str) -> None:
    rows = load(name)
    assert len(rows) >= 150
    assert len({row.prompt for row in rows}) == len(rows)
    assert {row.side for row in rows} == {"workload", "fit"}
    for row in rows:
        assert row.prompt
        assert all(row.answers)
        assert row.difficulty in {"easy", "medium", "hard", "beyond"}


def test_a_row_survives_its_file() -> None:
    row = Row("p", ("a", "b"), "sql", "wikisql", "easy", "fit")
    assert json.loads(row.to_line())["answers"] == ["a", "b"]
