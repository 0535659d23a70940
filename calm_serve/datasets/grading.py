"""Grades of answers: against references, by a validator, or by a judge that is an SLM itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from calm_serve.datasets.table import PromptText
from calm_serve.learning import quality_label
from calm_serve.validation import validate

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CHOICE = re.compile(r"(?<![A-Za-z])[A-J](?![A-Za-z])")
_GRADE = re.compile(r"(?<![\d.])(10|[1-9])(?![\d.]*\d)")
_BEST_GRADE = 10  # the judge grades from 1
JUDGE_TOKENS = 16
_JUDGE = """You grade the answer of an assistant. A grade is a whole number from 1 to 10: 1 for an \
answer that is wrong or beside the question, 5 for one that helps in part, 10 for one that is \
right, complete and in the form that was asked for. Length is no merit.

[Question]
{question}

[Answer]
{answer}

[End of the answer]
Reply with the grade alone."""


class Match(StrEnum):
    """When an answer equals a reference."""

    EXACT = "exact"  # up to case, outer marks and runs of spaces
    CONTAINS = "contains"  # the reference occurs in it as whole words, up to case
    NUMBER = "number"  # its last number is the reference's last number
    CHOICE = "choice"  # its first capital letter from A to J that stands alone is the reference


class PromptRow(PromptText):
    """One line of the prompts that are asked: the text, and how its answers are graded.

    Without `answers` and `validator` a judge grades them.
    """

    answers: tuple[str, ...] = Field(default=(), description="Right answers; one is enough.")
    match: Match = Field(default=Match.EXACT, description="When an answer is one of `answers`.")
    validator: Literal["", "json", "sql", "shell", "label"] = Field(
        default="", description="Check of the form; an answer that passes counts as 0.8."
    )
    json_schema: dict[str, Any] | None = Field(
        default=None, description="That an answer has to fit, with validator json."
    )
    labels: tuple[str, ...] = Field(default=(), description="Of validator label.")
    task: str | None = Field(default=None, min_length=1, description="Kept in the table.")
    split: Literal["train", "test"] | None = Field(default=None, description="Kept in the table.")
    max_tokens: int | None = Field(default=None, ge=1, description="Of an answer.")

    @model_validator(mode="after")
    def _has_one_grade(self) -> Self:
        if self.answers and self.validator:
            raise ValueError("answers: a line has either answers or a validator")
        if bool(self.labels) != (self.validator == "label"):
            raise ValueError("labels: they belong to validator label, and it needs them")
        if self.json_schema is not None and self.validator != "json":
            raise ValueError("json_schema: it belongs to validator json")
        return self

    @property
    def needs_judge(self) -> bool:
        """Whether only a judge can grade the answers."""
        return not self.answers and not self.validator


def grade(row: PromptRow, text: str) -> float | None:
    """Score of an answer in [0, 1]; None when it needs a judge.

    A validator's result counts as it does in the service's own log. Can take some 100 ms.
    """
    if row.answers:
        return float(any(_MATCHES[row.match](text, reference) for reference in row.answers))
    if not row.validator:
        return None
    signal = validate(row.validator, text, schema=row.json_schema, labels=row.labels)
    found = quality_label([signal])
    return None if found is None else found[0]


def judge_prompt(row: PromptRow, text: str) -> str:
    """The user message that asks a judge for a grade."""
    messages = row.body()["messages"]
    question = "\n\n".join(f"{m.get('role')}: {_text_of(m.get('content'))}" for m in messages)
    return _JUDGE.format(question=question, answer=text)


def read_grade(reply: str) -> float | None:
    """The judge's grade as a score in [0, 1]; None for a reply without one.

    >>> read_grade("Grade: 10")
    1.0
    """
    found = _GRADE.search(reply)
    return None if found is None else (int(found[1]) - 1) / (_BEST_GRADE - 1)


def _text_of(content: Any) -> str:
    if isinstance(content, list):  # parts: text, images
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def _exact(text: str, reference: str) -> bool:
    return _plain(text) == _plain(reference)


def _contains(text: str, reference: str) -> bool:
    words = re.escape(_plain(reference))
    return re.search(rf"(?<!\w){words}(?!\w)", _plain(text)) is not None


def _number(text: str, reference: str) -> bool:
    found, expected = _NUMBER.findall(text), _NUMBER.findall(reference)
    if not found or not expected:
        return False
    return float(found[-1].replace(",", "")) == float(expected[-1].replace(",", ""))


def _choice(text: str, reference: str) -> bool:
    found = _CHOICE.search(text)
    return found is not None and found[0] == reference.strip()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!\"'`*")


_MATCHES: Mapping[Match, Callable[[str, str], bool]] = {
    Match.EXACT: _exact,
    Match.CONTAINS: _contains,
    Match.NUMBER: _number,
    Match.CHOICE: _choice,
}
