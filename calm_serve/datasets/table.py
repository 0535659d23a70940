"""Score table: prompts with the score of every model on each, as JSON lines.

One line is one prompt:

    {"prompt": "…" or "messages": […], "scores": {"model": 0..1, …}, "costs": {…},
     "latencies_s": {…}, "task": "…", "split": "train" | "test"}

Only the text and `scores` are required. Every line names the same models. `costs` (in one unit of
the table's author), `latencies_s` (seconds), `task` and `split` are on every line or on none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import pydantic_core
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from calm_serve.config import Config, first_error
from calm_serve.errors import ConfigError, RequestError
from calm_serve.requests import parse_chat

Values = NDArray[np.float64]  # [rows, models]
Flags = NDArray[np.bool_]  # [rows]

TRAIN, TEST = "train", "test"
# Without `split`, this share of the prompts is for the test, drawn by a hash of the text: equal
# prompts are on one side, and a longer table keeps the sides of its former lines.
TEST_RATIO = 0.25
COLUMNS = ("costs", "latencies_s", "task", "split")  # on every line or on none

_Score = Annotated[float, Field(strict=True, ge=0.0, le=1.0, allow_inf_nan=False)]
_Amount = Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)]
_Model = Annotated[str, Field(min_length=1, max_length=128)]
_Task = Annotated[str, Field(min_length=1, max_length=128)]
_Row = TypeVar("_Row", bound="PromptText")


class PromptText(Config):
    """The text of a prompt: exactly one of `prompt` and `messages`."""

    prompt: str | None = Field(default=None, min_length=1, description="One user message.")
    messages: tuple[dict[str, Any], ...] | None = Field(
        default=None, min_length=1, description="Messages as in a chat completion."
    )

    @model_validator(mode="after")
    def _has_one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of `prompt` and `messages` is needed")
        try:
            parse_chat(self.body())
        except RequestError as error:
            raise ValueError(error.message) from error
        return self

    def body(self) -> dict[str, Any]:
        """The prompt as a body of `/v1/chat/completions`."""
        if self.messages is not None:
            return {"messages": list(self.messages)}
        return {"messages": [{"role": "user", "content": self.prompt}]}

    @property
    def key(self) -> str:
        """Hash of the text: equal for equal prompts, in either form."""
        text = json.dumps(self.body(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class TableRow(PromptText):
    """One line of a score table."""

    scores: dict[_Model, _Score] = Field(min_length=1, description="Model to score in [0, 1].")
    costs: dict[_Model, _Amount] | None = Field(
        default=None, description="Model to cost of this answer, in one unit for the whole table."
    )
    latencies_s: dict[_Model, _Amount] | None = Field(
        default=None, description="Model to seconds that this answer took."
    )
    task: _Task | None = Field(default=None, description="What the prompt asks for.")
    split: Literal["train", "test"] | None = Field(
        default=None, description="Whether the prompt is learned from or tested on."
    )

    @model_validator(mode="after")
    def _columns_have_the_same_models(self) -> Self:
        for name in ("costs", "latencies_s"):
            found = getattr(self, name)
            if found is not None and (wrong := difference(found, self.scores)):
                raise ValueError(f"{name}: {wrong}")
        return self

    @property
    def chars(self) -> int:
        """Length of all messages, with their roles."""
        return len(parse_chat(self.body()).text)

    def line(self) -> str:
        """The row as a line of a table, with its newline."""
        return json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Rows in the order of the file; arrays have shape [rows, models]."""

    rows: tuple[TableRow, ...]
    models: tuple[str, ...]
    scores: Values
    costs: Values | None  # None when the table has none
    latencies_s: Values | None
    tests: Flags  # which rows are for the test
    tasks: tuple[str, ...] | None = field(default=None)

    def part(self, chosen: Flags | Sequence[int]) -> ScoreTable:
        """The rows that `chosen` marks or numbers, in its order."""
        places = np.arange(len(self.rows))[chosen]
        return replace(
            self,
            rows=tuple(self.rows[i] for i in places),
            scores=self.scores[places],
            costs=None if self.costs is None else self.costs[places],
            latencies_s=None if self.latencies_s is None else self.latencies_s[places],
            tests=self.tests[places],
            tasks=None if self.tasks is None else tuple(self.tasks[i] for i in places),
        )

    @property
    def train(self) -> ScoreTable:
        """The rows that are learned from."""
        return self.part(~self.tests)

    @property
    def test(self) -> ScoreTable:
        """The rows that are tested on."""
        return self.part(self.tests)


def read_table(path: Path) -> ScoreTable:
    """Read and check a table. Raises ConfigError that names the line and the field."""
    return table_of(read_lines(path, TableRow), path.name)


def table_of(rows: Sequence[TableRow], name: str = "table") -> ScoreTable:
    """The table of these rows; row i is line i + 1 of `name` in errors. Raises ConfigError."""
    if not rows:
        raise ConfigError(f"{name}: there is no row")
    for number, row in enumerate(rows, start=1):
        if wrong := _unlike(row, rows[0]):
            raise ConfigError(f"{name}: line {number}: {wrong}")
    _check_splits(rows, name)
    models = tuple(sorted(rows[0].scores))
    return ScoreTable(
        rows=tuple(rows),
        models=models,
        scores=_array([row.scores for row in rows], models),
        costs=_optional([row.costs for row in rows], models),
        latencies_s=_optional([row.latencies_s for row in rows], models),
        tests=np.array([row.split == TEST if row.split else _drawn(row) for row in rows]),
        tasks=tuple(str(row.task) for row in rows) if rows[0].task is not None else None,
    )


def read_lines(path: Path, kind: type[_Row]) -> list[_Row]:
    """Read JSON lines of one kind. Raises ConfigError that names the line and the field."""
    try:
        with path.open("rb") as lines:
            return [row_of(line, kind, f"{path.name}: line {i}") for i, line in enumerate(lines, 1)]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def row_of(line: bytes, kind: type[_Row], where: str) -> _Row:
    """Read one line. Raises ConfigError that starts with `where` and names the field."""
    try:
        data = pydantic_core.from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_error('', error)}") from error


def difference(found: Iterable[str], expected: Iterable[str]) -> str:
    """What distinguishes two sets of models, "" when nothing does."""
    names, known = set(found), set(expected)
    if missing := sorted(known - names):
        return f"{missing[0]!r} is missing"
    if more := sorted(names - known):
        return f"{more[0]!r} is not among the models {', '.join(sorted(known))}"
    return ""


def _unlike(row: TableRow, first: TableRow) -> str:
    """How a row's columns differ from those of the first one, "" when they do not."""
    if wrong := difference(row.scores, first.scores):
        return f"scores: {wrong}"
    for name in COLUMNS:
        has, expected = (getattr(r, name) is not None for r in (row, first))
        if has != expected:
            return f"{name}: {'line 1 has none' if has else 'missing, line 1 has it'}"
    return ""


def _check_splits(rows: Sequence[TableRow], name: str) -> None:
    """Raise ConfigError when a prompt is both learned from and tested on, or a side is empty."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        before = seen.setdefault(row.key, number)
        if row.split != rows[before - 1].split:
            raise ConfigError(
                f"{name}: line {number}: split: the same prompt is in line {before} with split "
                f"{rows[before - 1].split!r}"
            )
    sides = {row.split for row in rows}
    if sides == {TRAIN} or sides == {TEST}:
        (missing,) = {TRAIN, TEST} - sides
        raise ConfigError(f"{name}: split: no line has {missing!r}")


def _drawn(row: TableRow) -> bool:
    return int(row.key[:8], 16) < TEST_RATIO * 2**32


def _optional(
    amounts: Sequence[Mapping[str, float] | None], models: Sequence[str]
) -> Values | None:
    found = [amount for amount in amounts if amount is not None]
    return _array(found, models) if found else None


def _array(amounts: Sequence[Mapping[str, float]], models: Sequence[str]) -> Values:
    return np.array([[amount[model] for model in models] for amount in amounts], dtype=np.float64)
