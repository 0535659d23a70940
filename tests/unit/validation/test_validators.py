"""Validators and the label that follows from them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from calm_serve.errors import RequestError
from calm_serve.learning.labels import (
    PASSED_LABEL,
    SHELL_WEIGHT,
    VALIDATOR_WEIGHT,
    quality_label,
)
from calm_serve.types import QualitySignal
from calm_serve.validation.validators import MAX_TEXT_BYTES, validate

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
}


def valid(kind: str, text: str, **options: Any) -> bool:
    return validate(kind, text, **options).value == 1.0


def test_a_signal_names_its_source_and_time() -> None:
    assert validate("json", "{}", at=3.0) == QualitySignal("validator:json", 1.0, 3.0)


@pytest.mark.parametrize("text", ['{"a": [1, null]}', " [] ", '"text"'])
def test_json_that_parses_is_valid(text: str) -> None:
    assert valid("json", text)


@pytest.mark.parametrize(
    "text",
    ["", "{'a': 1}", '{"a": 1', "NaN", '{"a": 1} and more', "```json\n{}\n```", "[" * 50_000],
)
def test_json_that_a_strict_parser_refuses_is_invalid(text: str) -> None:
    assert not valid("json", text)


@pytest.mark.parametrize(
    ("text", "fits"), [('{"age": 3}', True), ('{"age": -1}', False), ("{}", False), ("nope", False)]
)
def test_json_must_fit_the_schema_that_was_asked_for(text: str, fits: bool) -> None:
    assert valid("json", text, schema=PERSON) is fits


def test_references_inside_the_schema_are_followed() -> None:
    schema = {"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}}
    assert valid("json", "[1]", schema=schema)
    assert not valid("json", '["x"]', schema=schema)


def test_a_broken_schema_does_not_count_against_the_answer() -> None:
    assert valid("json", "{}", schema={"type": "no such type"})
    assert not valid("json", "{", schema={"type": "no such type"})


def test_a_schema_that_points_elsewhere_is_not_fetched() -> None:
    assert valid("json", "1", schema={"$ref": "http://127.0.0.1:1/schema.json"})


DOUBLING: dict[str, Any] = {
    "$defs": {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
        for i in range(40)
    }
    | {"d40": {}},
    "$ref": "#/$defs/d0",
}


INNER = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        (json.dumps("a" * 60 + "!"), {"pattern": "^(a|a)*$"}),
        ("1", DOUBLING),
        ("1", {"$ref": "#/$defs/inner", "$defs": {**DOUBLING["$defs"], "inner": INNER}}),
        ("1", {"$ref": "#"}),
        (json.dumps([[i] for i in range(7000)] + [{}]), {"uniqueItems": True}),
    ],
    ids=["backtracking", "doubling", "doubling behind a dialect", "endless", "quadratic"],
)
def test_a_hostile_schema_costs_bounded_time(text: str, schema: dict[str, Any]) -> None:
    started = time.process_time()
    validate("json", text, schema=schema)
    assert time.process_time() - started < 3.0


@pytest.mark.parametrize(
    "text",
    [
        "SELECT name FROM users WHERE age > 3",
        "```sql\nSELECT 1\n```",
        "WITH a AS (SELECT 1) SELECT * FROM a; DELETE FROM b",
        "CREATE TABLE t (a INT)",
    ],
)
def test_sql_statements_are_valid(text: str) -> None:
    assert valid("sql", text)


@pytest.mark.parametrize("text", ["", "hello world", "SELECT FROM WHERE", "SELECT (1", "SELECT 'a"])
def test_text_that_is_no_sql_statement_is_invalid(text: str) -> None:
    assert not valid("sql", text)


@pytest.mark.parametrize(
    "text",
    [
        "find . -name '*.py' | xargs grep -l foo",
        r"find . \( -name a -o -name b \) -print",
        'echo "$(date)" && ls',
        "case $x in a) echo 1;; esac",
    ],
)
def test_shell_commands_are_valid(text: str) -> None:
    assert valid("shell", text)


@pytest.mark.parametrize("text", ["", "echo 'open", "ls |", "&& ls", "(cd x; ls", "echo )("])
def test_unbalanced_shell_is_invalid(text: str) -> None:
    assert not valid("shell", text)


def test_a_label_is_compared_without_case_and_outer_space() -> None:
    assert valid("label", " Book_Flight\n", labels=["book_flight", "oos"])
    assert not valid("label", "book a flight", labels=["book_flight", "oos"])


def test_a_label_check_without_labels_is_the_clients_mistake() -> None:
    with pytest.raises(RequestError, match="x-calm-labels"):
        validate("label", "a")


def test_an_unknown_validator_is_the_clients_mistake() -> None:
    with pytest.raises(RequestError, match="python"):
        validate("python", "pass")


def test_an_answer_beyond_the_bound_is_invalid() -> None:
    assert valid("json", json.dumps("x" * (MAX_TEXT_BYTES - 2)))
    assert not valid("json", json.dumps("x" * (MAX_TEXT_BYTES - 1)))
    assert not valid("json", json.dumps("é" * (MAX_TEXT_BYTES // 2), ensure_ascii=False))


PASSED = QualitySignal("validator:json", 1.0, 1.0)
FAILED = QualitySignal("validator:sql", 0.0, 1.0)


def test_no_known_signal_is_no_label() -> None:
    assert quality_label([]) is None
    assert quality_label([QualitySignal("unknown", 1.0)]) is None


def test_feedback_overrides_validators_both_ways() -> None:
    assert quality_label([FAILED, QualitySignal("feedback", 1.0)]) == (1.0, 1.0)
    assert quality_label([PASSED, QualitySignal("feedback", 0.0)]) == (0.0, 1.0)


def test_the_latest_feedback_counts() -> None:
    signals = [QualitySignal("feedback", 0.25, 9.0), QualitySignal("feedback", 1.0, 2.0)]
    assert quality_label(signals) == (0.25, 1.0)


def test_one_failing_validator_makes_the_label_zero() -> None:
    assert quality_label([PASSED, FAILED]) == (0.0, VALIDATOR_WEIGHT)


def test_a_passing_validator_is_weak_evidence_for_a_good_answer() -> None:
    assert quality_label([PASSED]) == (PASSED_LABEL, VALIDATOR_WEIGHT)
    shell = QualitySignal("validator:shell", 1.0)
    assert quality_label([shell]) == (PASSED_LABEL, SHELL_WEIGHT)
