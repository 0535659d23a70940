"""Format of outcomes between router and store: in a call, in a spool file, in a log of JSON lines.

Version 1 was flat, with nine untyped keys in `extra` and the predictor's version as one string.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pydantic_core

from calm_serve.errors import KnowledgeError, NewerRecordError
from calm_serve.protocol.formats import RecordFormat, to_json
from calm_serve.types import Outcome, QualitySignal

VERSION = 2  # of an outcome; raised when a field changes its name or meaning
BATCH = "outcomes"  # name in front of a batch
MAX_INTEGER = 2**31 - 1  # of a database column


def outcome_from_v1(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data of version 2 from that of version 1, which may lack fields with defaults."""
    old = dict(flat)
    if "decision" in old:  # a record of version 2 without name and version in front
        return old
    extra = dict(old.pop("extra", None) or {})
    slm_id = old["slm_id"]
    predicted = old.pop("predicted", None)
    decision = {name: old.pop(name) for name in ("path", "reason", "rule", "propensity")}
    load, shadow = extra.get("load_met"), extra.get("shadow")
    decision |= {
        "versions": versions_from_v1(old.pop("versions")),
        "predicted": _prediction(slm_id, *predicted) if predicted else None,
        "load_features": old.pop("load"),
        "load": None
        if load is None
        else dict(zip(("running", "in_flight", "ttft_ratio"), load, strict=True)),
        "terms": _terms(extra),
        "preferred": extra.get("preferred", ""),
        "preferred_hot": extra.get("preferred_hot"),
        "shadow": None if shadow is None else _shadow(shadow),
    }
    timing = {n: old.pop(n) for n in ("ttft_s", "e2e_s", "tpot_s", "decision_s", "cold")}
    engine = {
        "replica_id": old.pop("served_replica"),
        "queue_s": old.pop("queue_s", None),
        **{
            name: old.pop(name)
            for name in (
                "prompt_tokens",
                "cached_tokens",
                "output_tokens",
                "energy_j",
                "energy_source",
            )
        },
    }
    features = {name: old.pop(name) for name in ("numbers", "buckets")}
    prompt_text = old.pop("prompt", None)
    return {
        **old,
        "decision": decision,
        "features": features,
        "timing": timing,
        "engine": engine,
        "prompt_text": prompt_text,
    }


def versions_from_v1(versions: Sequence[str]) -> dict[str, Any]:
    """Versions as records; version 1 wrote the predictor as "champion+new-…+shipped"."""
    predictor, goals, fleet = versions
    champion, *parts = predictor.split("+")
    return {
        "predictor": {
            "champion": champion,
            "cold_start": next((p for p in parts if p.startswith("new-")), ""),
            "shipped": "shipped" in parts,
        },
        "goals": goals,
        "fleet": fleet,
    }


def _terms(extra: Mapping[str, Any]) -> dict[str, Any] | None:
    if "candidates" not in extra or "weights" not in extra:
        return None
    names = (
        "latency_per_s",
        "energy_per_j",
        "switching",
        "quality",
        "late_ttft_per_s",
        "late_ttft_after_s",
        "late_e2e_per_s",
        "late_e2e_after_s",
    )
    ttft_ms, tpot_ms, deadline_s = extra.get("slo") or (None, None, None)
    return {
        # The list ended before the weights of targets that were not set.
        "weights": dict(zip(names, extra["weights"], strict=False)),
        "candidates": [_candidate(*row) for row in extra["candidates"]],
        "left_out": extra.get("left_out", 0),
        "slo": {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "deadline_s": deadline_s},
        "quality_floor": extra.get("floor", 0.0),
    }


def _candidate(
    slm_id: str,
    success_ratio: float,
    output_tokens: float,
    ttft_s: float,
    tpot_s: float,
    energy_j: float,
    hot: int,
    calibration_factor: float,
    *spreads: float,
) -> dict[str, Any]:
    return {
        "prediction": _prediction(
            slm_id, success_ratio, output_tokens, ttft_s, tpot_s, energy_j, *spreads
        ),
        "hot": bool(hot),
        "calibration_factor": calibration_factor,
    }


def _prediction(slm_id: str, *values: float) -> dict[str, Any]:
    names = (
        "success_ratio",
        "output_tokens",
        "ttft_s",
        "tpot_s",
        "energy_j",
        "ttft_spread",
        "e2e_spread",
    )
    return {"slm_id": slm_id, **dict(zip(names, values, strict=False))}


def _shadow(shadow: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": shadow["version"],
        "slm_id": shadow["slm_id"],
        "agrees": shadow["agrees"],
        "success_ratio": shadow["success"],
        "gain": shadow["gain"],
    }


OUTCOME: RecordFormat[Outcome] = RecordFormat(
    "outcome", VERSION, Outcome, {1: outcome_from_v1}, bare=1
)
SIGNALS: RecordFormat[tuple[QualitySignal, ...]] = RecordFormat(
    "signals", 1, tuple[QualitySignal, ...]
)


def check(outcome: Outcome) -> Outcome:
    """Return the outcome. Raises KnowledgeError for a value that is not finite or out of bounds.

    Neither JSON in a database nor a training set can contain such a value, nor can a column of
    integers one of more than 32 bits. One such row would stop its whole batch.
    """
    if where := _not_finite(outcome):
        raise KnowledgeError(f"malformed outcome: {where} is not finite")
    for part in (outcome, outcome.engine):
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, int) and abs(value) > MAX_INTEGER:
                raise KnowledgeError(f"malformed outcome: {field.name} is above {MAX_INTEGER}")
    for signal in outcome.signals:
        if not 0.0 <= signal.value <= 1.0:
            raise KnowledgeError(f"malformed outcome: signal {signal.value} is not in [0, 1]")
    return outcome


def encode_batch(outcomes: Iterable[Outcome]) -> bytes:
    """Outcomes as one JSON document; takes some 60 us each."""
    return to_json({"format": BATCH, "version": VERSION, "record": list(outcomes)})


def decode_batch(data: bytes) -> tuple[list[Outcome], dict[str, str]]:
    """Read a document of `encode_batch`: outcomes, and id -> reason of malformed rows.

    The id of a malformed row without one is its position: `row 3`.

    Raises KnowledgeError when the document as a whole cannot be read.
    """
    try:
        document = pydantic_core.from_json(data)
        name, version, rows = (document[key] for key in ("format", "version", "record"))
    except (ValueError, KeyError, TypeError) as error:
        raise KnowledgeError(f"{BATCH}: not a batch: {error!r}") from error
    if name != BATCH or not isinstance(version, int) or version < 1 or not isinstance(rows, list):
        raise KnowledgeError(f"{BATCH}: not a batch: {name!r}, version {version!r}")
    if version > VERSION:
        raise NewerRecordError(
            f"{BATCH}: version {version} was written by a newer program; this one reads versions "
            f"up to {VERSION}"
        )
    outcomes: list[Outcome] = []
    refused: dict[str, str] = {}
    for position, row in enumerate(rows):
        try:
            document = {"format": OUTCOME.name, "version": version, "record": row}
            outcomes.append(check(OUTCOME.from_plain(document)))
        except KnowledgeError as error:
            outcome_id = row.get("outcome_id") if isinstance(row, dict) else None
            refused[str(outcome_id or f"row {position}")] = error.message
    return outcomes, refused


def _not_finite(value: Any, name: str = "outcome") -> str:
    """Name of the first field of a record that is not finite, "" when all are."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else name
    if isinstance(value, tuple):
        if value and isinstance(value[0], float):
            return "" if all(map(math.isfinite, value)) else name
        return next((found for item in value if (found := _not_finite(item, name))), "")
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is None:
        return ""
    inside = (_not_finite(getattr(value, field), field) for field in fields)
    return next((found for found in inside if found), "")
