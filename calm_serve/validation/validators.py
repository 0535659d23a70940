"""Quality signals from an answer's text: it parses, fits its schema, or is one of the labels.

The finish reason is not a signal: "stop" means that the model ended its answer, not that the answer
is right. The work is bounded (text size, schema steps) but can take some 100 ms, so call it in a
thread.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import jsonschema
import jsonschema.validators
import sqlglot
from referencing import Registry
from referencing.exceptions import Unresolvable
from sqlglot import expressions as sql
from sqlglot.errors import SqlglotError

from calm_serve.errors import RequestError
from calm_serve.types import VALIDATOR_PREFIX, QualitySignal

MAX_TEXT_BYTES = 64 * 1024
MAX_SCHEMA_STEPS = 20_000
# The schema comes from the client, so its cost must be bounded: a regular expression may backtrack
# for ever, and `uniqueItems` compares every item with every other.
_UNBOUNDED_KEYWORDS = ("pattern", "patternProperties", "uniqueItems")
_STATEMENTS = (sql.Query, sql.DML, sql.Create, sql.Drop, sql.Alter)
_FENCE = re.compile(r"\A```[\w-]*\n(.*?)\n?```\Z", re.DOTALL)
_OPERATORS = frozenset({"|", "||", "&&"})

_steps_left: ContextVar[int] = ContextVar("schema_steps_left")


class _TooManySteps(Exception):
    """The schema is too expensive to check here."""


def validate(
    kind: str,
    text: str,
    *,
    schema: Mapping[str, Any] | None = None,
    labels: Collection[str] = (),
    at: float = 0.0,
) -> QualitySignal:
    """Check an answer; the signal's value is 1.0 for valid and 0.0 for invalid.

    kind is "json" (strict JSON, and `schema` if given), "sql" (one or more statements in any
    dialect sqlglot reads), "shell" (weak: quotes, parentheses and operators only) or "label"
    (equal to one of `labels` up to case and outer space). A text above MAX_TEXT_BYTES is invalid.
    at is Unix time in seconds. Raises RequestError for an unknown kind or a label check without
    labels.
    """
    check = _CHECKS.get(kind)
    if check is None and kind != "label":
        raise RequestError(f"unknown validator {kind!r}", param="x-calm-validate")
    if kind == "label" and not labels:
        raise RequestError("validator 'label' needs x-calm-labels", param="x-calm-labels")
    if len(text) > MAX_TEXT_BYTES or len(text.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        valid = False
    elif check is None:
        valid = text.strip().casefold() in {x.strip().casefold() for x in labels}
    else:
        valid = check(text, schema)
    return QualitySignal(f"{VALIDATOR_PREFIX}{kind}", 1.0 if valid else 0.0, at)


def _json_ok(text: str, schema: Mapping[str, Any] | None) -> bool:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return schema is None or _fits(value, schema)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether `value` fits the schema; True when the schema cannot be checked here."""
    token = _steps_left.set(MAX_SCHEMA_STEPS)
    try:
        text = json.dumps(schema)
        if len(text) > MAX_TEXT_BYTES:
            return True
        draft = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        # At an inner "$schema" jsonschema would switch to its own, unbounded class.
        plain = json.loads(text, object_hook=_without_dialect)
        draft.check_schema(plain)
        # An empty registry resolves references inside the schema only: nothing is fetched.
        return bool(_bounded(draft)(plain, registry=Registry()).is_valid(value))
    except (jsonschema.SchemaError, Unresolvable, RecursionError, ValueError, _TooManySteps):
        return True
    finally:
        _steps_left.reset(token)


def _without_dialect(schema: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in schema.items() if k != "$schema"}


@lru_cache(maxsize=16)
def _bounded(draft: Any) -> Any:
    """Return the draft's validator class, with a budget of steps, without unbounded keywords."""
    keywords = {
        name: _counted(check)
        for name, check in draft.VALIDATORS.items()
        if name not in _UNBOUNDED_KEYWORDS
    }
    return jsonschema.validators.create(
        meta_schema=draft.META_SCHEMA,
        validators=keywords,
        type_checker=draft.TYPE_CHECKER,
        id_of=draft.ID_OF,
    )


def _counted(check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        left = _steps_left.get()
        if left <= 0:
            raise _TooManySteps
        _steps_left.set(left - 1)
        yield from check(validator, value, instance, schema) or ()

    return counted


def _sql_ok(text: str, _schema: Mapping[str, Any] | None) -> bool:
    try:
        statements = sqlglot.parse(_unfenced(text))
    except (SqlglotError, RecursionError):
        return False
    # sqlglot parses two plain words as an aliased column, so only statements count.
    found = [s for s in statements if s is not None]
    return bool(found) and all(isinstance(s, _STATEMENTS) for s in found)


def _shell_ok(text: str, _schema: Mapping[str, Any] | None) -> bool:
    lexer = shlex.shlex(_unfenced(text), posix=True, punctuation_chars=True)
    try:
        tokens = list(lexer)
    except ValueError:  # an open quote or a trailing backslash
        return False
    if not tokens or tokens[0] in _OPERATORS or tokens[-1] in _OPERATORS:
        return False
    if "case" in tokens:  # in patterns of `case`, parentheses are closed that were not opened
        return True
    depth = 0
    for token in tokens:
        if set(token) <= set("()"):
            for char in token:
                depth += 1 if char == "(" else -1
                if depth < 0:
                    return False
    return depth == 0


def _unfenced(text: str) -> str:
    match = _FENCE.match(text.strip())
    return match.group(1) if match else text.strip()


_CHECKS: Mapping[str, Callable[[str, Mapping[str, Any] | None], bool]] = {
    "json": _json_ok,
    "sql": _sql_ok,
    "shell": _shell_ok,
}
