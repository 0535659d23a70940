"""Columns: an outcome as a row of the store; scalars one by one, nested records as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from calm_serve.config import first_error
from calm_serve.errors import KnowledgeError
from calm_serve.types import (
    DecisionSummary,
    DecisionTerms,
    EngineFacts,
    FailedAttempt,
    GeneralTerms,
    LoadAtDecision,
    LoggedCandidate,
    Novelty,
    Outcome,
    Prediction,
    PredictorVersion,
    PromptFeatures,
    QualitySignal,
    ServiceLevel,
    ShadowChoice,
    Timing,
    Versions,
    Weights,
)

_PREDICTION = tuple(f.name for f in fields(Prediction))
_WEIGHTS = tuple(f.name for f in fields(Weights))
_signals = TypeAdapter(QualitySignal)


def decode_signals(
    signals: Iterable[QualitySignal | Mapping[str, Any]],
) -> tuple[QualitySignal, ...]:
    """Accept signals or their dict form. Raises KnowledgeError when one is malformed."""
    try:
        decoded = tuple(
            _signals.validate_python(dict(s) if isinstance(s, Mapping) else s) for s in signals
        )
    except ValidationError as error:
        raise KnowledgeError(f"malformed signal: {first_error('', error)}") from error
    for signal in decoded:
        if not (0.0 <= signal.value <= 1.0 and abs(signal.at) < float("inf")):
            raise KnowledgeError(f"malformed signal: value {signal.value} is not in [0, 1]")
    return decoded


def to_columns(outcome: Outcome) -> dict[str, Any]:
    """Column -> value of an outcome without its signals, as both databases accept them."""
    decision, timing, engine = outcome.decision, outcome.timing, outcome.engine
    columns = {
        "outcome_id": outcome.outcome_id,
        "at": outcome.at,
        "slm_id": outcome.slm_id,
        "adapter": outcome.adapter,
        "status": outcome.status,
        "http_status": outcome.http_status,
        "failure": outcome.failure,
        "failed_attempts": [asdict(a) for a in outcome.failed_attempts] or None,
        "cost": outcome.cost,
        "currency": outcome.currency,
        "retries": outcome.retries,
        "predicted_replica": outcome.predicted_replica,
        "task": outcome.task,
        "prompt": outcome.prompt_text,
        "path": decision.path,
        "reason": decision.reason,
        "rule": decision.rule,
        "propensity": decision.propensity,
        "versions": asdict(decision.versions),
        "predicted": None if decision.predicted is None else _numbers_of(decision.predicted),
        "load": list(decision.load_features),
        "load_at_decision": None if decision.load is None else asdict(decision.load),
        "terms": None if decision.terms is None else _pack_terms(decision.terms),
        "preferred": decision.preferred,
        "preferred_hot": decision.preferred_hot,
        "shadow": None if decision.shadow is None else asdict(decision.shadow),
        "numbers": list(outcome.features.numbers),
        "buckets": list(outcome.features.buckets),
        "bits": list(outcome.features.bits),
        "novelty": None if decision.novelty is None else asdict(decision.novelty),
        **asdict(timing),
        "served_replica": engine.replica_id,
        "prompt_tokens": engine.prompt_tokens,
        "cached_tokens": engine.cached_tokens,
        "output_tokens": engine.output_tokens,
        "queue_s": engine.queue_s,
        "energy_j": engine.energy_j,
        "energy_source": engine.energy_source,
        "engine_ttft_s": engine.ttft_s,
        "engine_running": engine.running,
        "engine_waiting": engine.waiting,
        "engine_kv_usage_ratio": engine.kv_usage_ratio,
    }
    return {name: _clean(v) if isinstance(v, str) else v for name, v in columns.items()}


def from_columns(row: Mapping[str, Any], signals: Sequence[QualitySignal]) -> Outcome:
    """The outcome of a row; the reverse of `to_columns`."""
    return Outcome(
        outcome_id=row["outcome_id"],
        slm_id=row["slm_id"],
        at=row["at"],
        adapter=row["adapter"],
        status=row["status"],
        http_status=row["http_status"],
        failure=row["failure"],
        failed_attempts=tuple(FailedAttempt(**a) for a in row["failed_attempts"] or ()),
        cost=row["cost"],
        currency=row["currency"],
        retries=row["retries"],
        predicted_replica=row["predicted_replica"],
        task=row["task"],
        prompt_text=row["prompt"],
        decision=_decision_of(row),
        features=PromptFeatures(*(tuple(row[n]) for n in ("numbers", "buckets", "bits"))),
        timing=Timing(row["ttft_s"], row["e2e_s"], row["tpot_s"], row["decision_s"], row["cold"]),
        engine=EngineFacts(
            replica_id=row["served_replica"],
            prompt_tokens=row["prompt_tokens"],
            cached_tokens=row["cached_tokens"],
            output_tokens=row["output_tokens"],
            queue_s=row["queue_s"],
            ttft_s=row["engine_ttft_s"],
            energy_j=row["energy_j"],
            energy_source=row["energy_source"],
            running=row["engine_running"],
            waiting=row["engine_waiting"],
            kv_usage_ratio=row["engine_kv_usage_ratio"],
        ),
        signals=tuple(signals),
    )


def _decision_of(row: Mapping[str, Any]) -> DecisionSummary:
    load, terms, shadow = row["load_at_decision"], row["terms"], row["shadow"]
    versions, predicted, novelty = row["versions"], row["predicted"], row["novelty"]
    return DecisionSummary(
        path=row["path"],
        reason=row["reason"],
        rule=row["rule"],
        propensity=row["propensity"],
        versions=Versions(
            PredictorVersion(**versions["predictor"]), versions["goals"], versions["fleet"]
        ),
        predicted=None if predicted is None else Prediction(row["slm_id"], *predicted),
        load_features=tuple(row["load"]),
        load=None if load is None else LoadAtDecision(**load),
        terms=None if terms is None else _unpack_terms(terms),
        preferred=row["preferred"],
        preferred_hot=row["preferred_hot"],
        shadow=None if shadow is None else ShadowChoice(**shadow),
        novelty=None if novelty is None else Novelty(**novelty),
    )


def _pack_terms(terms: DecisionTerms) -> dict[str, Any]:
    """One list per field over all candidates, so that each field's name is stored once."""
    predictions = [c.prediction for c in terms.candidates]
    return {
        "candidates": {
            **{name: [getattr(p, name) for p in predictions] for name in _PREDICTION},
            "hot": [c.hot for c in terms.candidates],
            "calibration_factor": [c.calibration_factor for c in terms.candidates],
            "general": [c.general and astuple(c.general) for c in terms.candidates],
        },
        "weights": {name: getattr(terms.weights, name) for name in _WEIGHTS},
        "left_out": terms.left_out,
        "slo": asdict(terms.slo),
        "quality_floor": terms.quality_floor,
    }


def _unpack_terms(packed: Mapping[str, Any]) -> DecisionTerms:
    candidates = packed["candidates"]
    predictions = zip(*(candidates[name] for name in _PREDICTION), strict=True)
    return DecisionTerms(
        candidates=tuple(
            LoggedCandidate(Prediction(*values), hot, factor, general and GeneralTerms(*general))
            for values, hot, factor, general in zip(
                predictions,
                candidates["hot"],
                candidates["calibration_factor"],
                # Rows of schema 2 have none.
                candidates.get("general") or [None] * len(candidates["hot"]),
                strict=True,
            )
        ),
        weights=Weights(**packed["weights"]),
        left_out=packed["left_out"],
        slo=ServiceLevel(**packed["slo"]),
        quality_floor=packed["quality_floor"],
    )


def _numbers_of(prediction: Prediction) -> list[float]:
    """All fields except the SLM's id, which has a column of its own."""
    return [getattr(prediction, name) for name in _PREDICTION[1:]]


def _clean(text: str) -> str:
    # A prompt may contain lone surrogates, which UTF-8 cannot encode, and the zero character, which
    # PostgreSQL refuses.
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")
