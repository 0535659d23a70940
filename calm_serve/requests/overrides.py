"""Constraints and labels from the request's headers; every error names the header."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from calm_serve.errors import RequestError

# An hour, the longest time that a deployment may give a request (`router.request_timeout_s`). A
# longer objective can only be a mistake in the unit.
MAX_SLO_S = 3600.0
MAX_SLO_MS = 1000.0 * MAX_SLO_S
# A session id is hashed and a task is kept with its outcome; what is longer is cut, not refused.
MAX_SESSION_CHARS, MAX_TASK_CHARS = 256, 64
VALIDATORS = ("json", "sql", "shell", "label")
_OVERRIDES = (
    "x-calm-quality-floor",
    "x-calm-data-policy",
    "x-calm-task",
    "x-calm-validate",
    "x-calm-labels",
    "x-calm-deadline-s",
)


@dataclass(frozen=True, slots=True)
class Overrides:
    """Constraints and labels from the request's headers."""

    session_id: str = ""
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    deadline_s: float | None = None
    quality_floor: float = 0.0
    local_only: bool = False
    task: str = ""
    validate: str = ""
    labels: tuple[str, ...] = ()


_NO_OVERRIDES = Overrides()


def parse_overrides(headers: Mapping[str, str]) -> Overrides:
    """Read `x-slo-*`, `x-session-id` and `x-calm-*`; names are lower case.

    Raises RequestError for a value out of range, for an unknown `x-calm-` header, and for a check
    against labels without labels.
    """
    if not headers:
        return _NO_OVERRIDES
    for name in headers:
        if name.startswith("x-calm-") and name not in _OVERRIDES:
            near = difflib.get_close_matches(name, _OVERRIDES, n=1, cutoff=0.0)[0]
            raise RequestError(f"unknown header {name!r}; the nearest is {near!r}", param=name)
    policy = headers.get("x-calm-data-policy", "any")
    if policy not in ("any", "local"):
        raise RequestError(
            f"x-calm-data-policy must be 'any' or 'local', got {policy!r}",
            param="x-calm-data-policy",
        )
    validate, labels = _check(headers)
    return Overrides(
        session_id=headers.get("x-session-id", "")[:MAX_SESSION_CHARS],
        slo_ttft_ms=_number(headers, "x-slo-ttft-ms", 0.0, MAX_SLO_MS),
        slo_tpot_ms=_number(headers, "x-slo-tpot-ms", 0.0, MAX_SLO_MS),
        deadline_s=_number(headers, "x-calm-deadline-s", 0.0, MAX_SLO_S),
        quality_floor=_number(headers, "x-calm-quality-floor", 0.0, 1.0) or 0.0,
        local_only=policy == "local",
        task=headers.get("x-calm-task", "")[:MAX_TASK_CHARS],
        validate=validate,
        labels=labels,
    )


def _check(headers: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    validate = headers.get("x-calm-validate", "")
    if validate and validate not in VALIDATORS:
        raise RequestError(
            f"x-calm-validate must be one of {', '.join(VALIDATORS)}, got {validate!r}",
            param="x-calm-validate",
        )
    labels = tuple(x.strip() for x in headers.get("x-calm-labels", "").split(",") if x.strip())
    if validate == "label" and not labels:
        raise RequestError(
            "x-calm-validate 'label' needs the labels that may be answered: x-calm-labels is "
            "missing or empty",
            param="x-calm-labels",
        )
    return validate, labels


def _number(headers: Mapping[str, str], name: str, low: float, high: float) -> float | None:
    raw = headers.get(name)
    if raw is None:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}", param=name)
    return value
