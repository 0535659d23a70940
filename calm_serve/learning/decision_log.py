"""What is logged of a scored decision, and the same decision made again from the log.

P(success) and answer length follow from the logged prompt features; latency and energy of an SLM
also depend on the fleet at that moment, which nobody can rebuild. So the prediction of every
candidate is logged (`Outcome.extra`, about 50 bytes each, MAX_LOGGED at most). A decision made
again keeps the logged TTFT, TPOT and joules per token, and may replace the rest: other goals,
another predictor's P(success) and lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from calm_serve.requests import NUMBER_NAMES
from calm_serve.routing import scoring
from calm_serve.types import (
    Candidate,
    Decision,
    DecisionPath,
    Outcome,
    OutputShape,
    Prediction,
    Residency,
    RoutingContext,
    SLMState,
    Weights,
)

MAX_LOGGED = 32
_DIGITS = 6  # after the point: microseconds, microjoules
_CHOSEN_FREELY = (
    DecisionPath.SCORED,
    DecisionPath.PRIOR,
    DecisionPath.EXPLORED,
    DecisionPath.BASELINE,
)
_WEIGHTS = tuple(f.name for f in fields(Weights))
_MAX_OUTPUT_TOKENS = NUMBER_NAMES.index("log_max_output_tokens")

# SLM to P(success) and output tokens; None keeps what was logged.
PromptValues = Mapping[str, tuple[float | None, float | None]]


class PromptPredictor(Protocol):
    """What a predictor can say from the log alone."""

    version: str

    def of_prompt(
        self, numbers: Sequence[float], buckets: Sequence[int]
    ) -> dict[str, tuple[float | None, float | None]]:
        """P(success) and output tokens by SLM."""
        ...


@dataclass(frozen=True, slots=True)
class LoggedDecision:
    """A choice among predicted candidates, as it was logged."""

    outcome: Outcome
    chosen: str  # by the decision; after a failover another SLM answered
    predictions: tuple[tuple[Prediction, SLMState], ...]  # the chosen one first
    weights: Weights
    context: RoutingContext  # holds only what scoring reads
    complete: bool  # False when there were more than MAX_LOGGED candidates


def log_fields(decision: Decision) -> dict[str, Any]:
    """What `Outcome.extra` keeps of a decision; empty unless it chose among predictions.

    "candidates" are [SLM, P(success), tokens, TTFT, TPOT, joules, hot, quality factor], the chosen
    one first; "weights" those of types.Weights; "slo" and "floor" only where the request named one,
    and with an SLO each candidate's spreads of TTFT and E2E.
    """
    weights = decision.weights
    if decision.path not in _CHOSEN_FREELY or weights is None:
        return {}
    rows = [_row(c) for c in decision.candidates if c.prediction is not None]
    if not any(row[0] == decision.slm_id for row in rows):
        return {}
    if not all(math.isfinite(sum(row[1:])) for row in rows):
        return {}  # a store takes no NaN, and one row must not cost its batch
    rows.sort(key=lambda row: row[0] != decision.slm_id)  # stable: best score first after it
    terms: dict[str, Any] = {
        "candidates": rows[:MAX_LOGGED],
        "weights": _weights(weights),
    }
    if len(rows) > MAX_LOGGED:
        terms["left_out"] = len(rows) - MAX_LOGGED
    context = decision.context
    if context.slo_ttft_ms or context.slo_tpot_ms or context.deadline_s:
        terms["slo"] = [context.slo_ttft_ms, context.slo_tpot_ms, context.deadline_s]
        spreads = {c.slm_id: _spreads(c) for c in decision.candidates}
        for row in terms["candidates"]:
            row += spreads[row[0]]
    if context.quality_floor:
        terms["floor"] = context.quality_floor
    return terms


def read_decision(outcome: Outcome) -> LoggedDecision | None:
    """Rebuild the choice from an outcome; None when it was none among predicted candidates."""
    extra = outcome.extra
    if "candidates" not in extra or "weights" not in extra or not outcome.numbers:
        return None
    slo = extra.get("slo") or (None, None, None)
    floor = float(extra.get("floor", 0.0))
    return LoggedDecision(
        outcome=outcome,
        chosen=str(extra["candidates"][0][0]),
        predictions=tuple(_read_row(row) for row in extra["candidates"]),
        weights=Weights(*extra["weights"]),
        context=context_of(outcome, slo, floor),
        complete="left_out" not in extra,
    )


def rescore(
    logged: LoggedDecision, weights: Weights | None = None, values: PromptValues | None = None
) -> list[Candidate]:
    """The candidates, best first, under other weights or another predictor's values."""
    limit = _max_output_tokens(logged.outcome)
    return scoring.ranked(
        [
            scoring.evaluate(
                logged.context,
                _updated(prediction, (values or {}).get(prediction.slm_id), limit),
                state,
                weights or logged.weights,
            )
            for prediction, state in logged.predictions
        ]
    )


def redecide(
    logged: LoggedDecision,
    ranked: list[Candidate],
    quality_floor: float = 0.0,
    exploration_ratio: float = 0.0,
) -> str:
    """The SLM that would have been chosen from `rescore`'s candidates.

    quality_floor is the goals' own; the request's is in the log. With an exploration_ratio the
    draw is the logged decision's.
    """
    floor = max(quality_floor, logged.context.quality_floor)
    order = scoring.above_floor(ranked, floor)
    chosen, _, _ = scoring.explore(order, logged.outcome.outcome_id, exploration_ratio)
    return chosen.slm_id


def _weights(weights: Weights) -> list[float]:
    """All fields in order; those of targets that are not set are 0 at the end, and left out."""
    values: list[float] = [getattr(weights, name) for name in _WEIGHTS]
    while len(values) > 4 and values[-1] == 0.0:
        values.pop()
    return values


def _row(candidate: Candidate) -> list[Any]:
    expected = candidate.prediction
    assert expected is not None
    factor = candidate.quality / expected.success_ratio if expected.success_ratio > 0.0 else 1.0
    # Without a weight for switching nobody knows, and it made no difference.
    hot = 0 if candidate.switching > 0.0 else 1
    return [  # field by field: dataclasses.astuple copies deeply, which costs ten times as much
        expected.slm_id,
        round(expected.success_ratio, _DIGITS),
        round(expected.output_tokens, _DIGITS),
        round(expected.ttft_s, _DIGITS),
        round(expected.tpot_s, _DIGITS),
        round(expected.energy_j, _DIGITS),
        hot,
        1 if abs(factor - 1.0) < 1e-9 else round(factor, _DIGITS),
    ]


def _spreads(candidate: Candidate) -> list[float]:
    expected = candidate.prediction
    if expected is None:
        return []
    return [round(expected.ttft_spread, _DIGITS), round(expected.e2e_spread, _DIGITS)]


def _read_row(row: Sequence[Any]) -> tuple[Prediction, SLMState]:
    slm_id, success, tokens, ttft_s, tpot_s, energy_j, hot, factor, *spreads = row
    state = SLMState(
        slm_id,
        residency=Residency.HOT if hot else Residency.ASLEEP,
        calibration_factor=float(factor),
    )
    return Prediction(slm_id, success, tokens, ttft_s, tpot_s, energy_j, *spreads), state


def _updated(
    prediction: Prediction, value: tuple[float | None, float | None] | None, limit: float
) -> Prediction:
    if value is None:
        return prediction
    success, tokens = value
    if success is not None:
        prediction = replace(prediction, success_ratio=success)
    if tokens is not None and prediction.output_tokens > 0.0:
        tokens = min(tokens, limit)
        joules = prediction.energy_j * tokens / prediction.output_tokens
        prediction = replace(prediction, output_tokens=tokens, energy_j=joules)
    return prediction


def _max_output_tokens(outcome: Outcome) -> float:
    logged = outcome.numbers[_MAX_OUTPUT_TOKENS]
    return float(round(math.expm1(logged))) if logged > 0.0 else math.inf


def context_of(
    outcome: Outcome,
    slo: Sequence[float | None] = (None, None, None),
    quality_floor: float = 0.0,
) -> RoutingContext:
    """What scoring reads of a logged request, and nothing else."""
    return RoutingContext(
        request_id=outcome.outcome_id,
        requested_model="auto",
        prompt_chars=0,
        prompt_tokens=outcome.prompt_tokens,
        max_output_tokens=None,
        output_shape=OutputShape.TEXT,
        turns=1,
        stream=False,
        language="und",
        has_code=False,
        has_image=False,
        safety_class="none",
        markers=(),
        session_key="",
        prefix_family="",
        prefix_chain=(),
        slo_ttft_ms=slo[0],
        slo_tpot_ms=slo[1],
        deadline_s=slo[2],
        quality_floor=quality_floor,
        numbers=outcome.numbers,
        buckets=outcome.buckets,
    )
