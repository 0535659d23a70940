"""Grades of answers: references, validators, and a judge's reply."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from calm_serve.datasets.grading import PromptRow, grade, judge_prompt, read_grade


def row(**fields: Any) -> PromptRow:
    return PromptRow.model_validate({"prompt": "What is it?"} | fields)


@pytest.mark.parametrize(
    ("match", "reference", "answer", "score"),
    [
        ("exact", "Paris", " paris. ", 1.0),
        ("exact", "Paris", "It is Paris", 0.0),
        ("exact", "a  b", "A\nb", 1.0),
        ("contains", "Paris", "The capital of France is Paris.", 1.0),
        ("contains", "Paris", "Comparison", 0.0),
        ("contains", "C++", "I would write it in C++ today", 1.0),
        ("number", "72", "48 + 24 = 72", 1.0),
        ("number", "1,200", "So she has $1200.00.", 1.0),
        ("number", "#### 72", "72 of 80", 0.0),
        ("number", "72", "none", 0.0),
        ("choice", "B", "B. Paris", 1.0),
        ("choice", "B", "The answer is (B)", 1.0),
        ("choice", "B", "Because A is larger", 0.0),
        ("choice", "B", "", 0.0),
    ],
)
def test_an_answer_is_compared_with_its_reference(
    match: str, reference: str, answer: str, score: float
) -> None:
    assert grade(row(answers=[reference], match=match), answer) == score


def test_one_right_reference_is_enough() -> None:
    assert grade(row(answers=["ten", "10"]), "10") == 1.0


def test_a_valid_form_counts_less_than_a_right_answer() -> None:
    assert grade(row(validator="json"), '{"a": 1}') == 0.8
    assert grade(row(validator="json"), "a: 1") == 0.0
    assert grade(row(validator="label", labels=["yes", "no"]), "Yes") == 0.8
    schema = {"type": "object", "required": ["b"]}
    assert grade(row(validator="json", json_schema=schema), '{"a": 1}') == 0.0


def test_without_reference_and_validator_a_judge_is_needed() -> None:
    assert row().needs_judge
    assert grade(row(), "anything") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answers": ["a"], "validator": "json"}, "either answers or a validator"),
        ({"validator": "label"}, "labels"),
        ({"labels": ["a"]}, "labels"),
        ({"json_schema": {}}, "json_schema"),
        ({"match": "fuzzy"}, "match"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_grading_that_cannot_be_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        row(**fields)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("10", 1.0),
        ("1", 0.0),
        ("Grade: 7/10", 6 / 9),
        ("**4**", 3 / 9),
        ("good", None),
        ("11", None),
    ],
)
def test_a_judges_grade_is_read(reply: str, score: float | None) -> None:
    assert read_grade(reply) == score


def test_the_judge_sees_every_message_and_the_answer() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "why?"}]},
    ]
    text = judge_prompt(PromptRow(messages=messages), "because {braces}")
    assert "system: be brief" in text
    assert "user: why?" in text
    assert "because {braces}" in text
