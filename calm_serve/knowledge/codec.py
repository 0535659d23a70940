"""Outcomes across a wire and in and out of the store's columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from calm_serve.config import first_error
from calm_serve.errors import KnowledgeError
from calm_serve.types import Outcome, QualitySignal

COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(Outcome) if f.name != "signals")
_FEATURES = ("numbers", "load", "predicted")


def decode_outcome(row: Outcome | Mapping[str, Any]) -> Outcome:
    """Accept an Outcome or its dict form. Raises KnowledgeError naming what is wrong.

    A value that is not finite is refused: neither JSON nor a training set has a place for it.
    """
    try:
        outcome = _outcomes().validate_python(dict(row) if isinstance(row, Mapping) else row)
    except ValidationError as error:
        raise KnowledgeError(f"malformed outcome: {first_error('', error)}") from error
    for name in COLUMNS:
        value = getattr(outcome, name)
        numbers = value if name in _FEATURES else (value,)
        if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
            raise KnowledgeError(f"malformed outcome: {name} is not finite")
    try:
        json.dumps(outcome.extra, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise KnowledgeError(f"malformed outcome: extra: {error}") from error
    _check(outcome.signals)
    return outcome


def decode_signals(
    signals: Iterable[QualitySignal | Mapping[str, Any]],
) -> tuple[QualitySignal, ...]:
    """Accept signals or their dict form. Raises KnowledgeError when one is malformed."""
    try:
        decoded = tuple(
            _signals().validate_python(dict(s) if isinstance(s, Mapping) else s) for s in signals
        )
    except ValidationError as error:
        raise KnowledgeError(f"malformed signal: {first_error('', error)}") from error
    _check(decoded)
    return decoded


def _check(signals: Iterable[QualitySignal]) -> None:
    for signal in signals:
        if not (0.0 <= signal.value <= 1.0 and math.isfinite(signal.at)):
            raise KnowledgeError(f"malformed signal: value {signal.value} is not in [0, 1]")


def to_columns(outcome: Outcome) -> dict[str, Any]:
    """The outcome's fields by column name, without its signals, as both databases take them."""
    return {name: _plain(getattr(outcome, name)) for name in COLUMNS}


def from_columns(row: Mapping[str, Any], signals: Sequence[QualitySignal]) -> Outcome:
    """Rebuild what `to_columns` took apart."""
    values: dict[str, Any] = {name: row[name] for name in COLUMNS}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return Outcome(**values, signals=tuple(signals))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, str):
        # A prompt may hold what UTF-8 or PostgreSQL cannot: lone surrogates and the zero character.
        return value.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")
    return value


@cache
def _outcomes() -> TypeAdapter[Outcome]:
    return TypeAdapter(Outcome)


@cache
def _signals() -> TypeAdapter[QualitySignal]:
    return TypeAdapter(QualitySignal)
