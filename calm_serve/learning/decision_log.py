"""What is logged of a scored decision, and the same decision made again from the log.

P(success) and answer length follow from the logged prompt features; latency and energy of an SLM
also depend on the fleet at that moment, which cannot be rebuilt later. So the prediction of every
candidate is logged (`types.DecisionTerms`, at most MAX_LOGGED). A decision made again keeps the
logged TTFT, TPOT and joules per token, and may replace the rest: other goals, another predictor's
P(success) and lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from calm_serve.requests import NUMBER_NAMES
from calm_serve.routing import above_floor, evaluate, explore, ranked
from calm_serve.types import (
    FREE_PATHS,
    Candidate,
    Decision,
    DecisionTerms,
    LoggedCandidate,
    Outcome,
    Prediction,
    PredictorVersion,
    Residency,
    ServiceLevel,
    SLMState,
    Weights,
)

MAX_LOGGED = 32
_DIGITS = 6  # after the point: microseconds, microjoules
_MAX_OUTPUT_TOKENS = NUMBER_NAMES.index("log_max_output_tokens")

# SLM to P(success) and output tokens; None keeps what was logged.
PromptValues = Mapping[str, tuple[float | None, float | None]]


class PromptPredictor(Protocol):
    """What a predictor can say from the log alone."""

    version: PredictorVersion

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
    terms: DecisionTerms

    @property
    def weights(self) -> Weights:
        """The weights that it was scored with."""
        return self.terms.weights

    @property
    def slo(self) -> ServiceLevel:
        """What the request named."""
        return self.terms.slo

    @property
    def complete(self) -> bool:
        """Whether every candidate is in the log."""
        return not self.terms.left_out


def decision_terms(decision: Decision) -> DecisionTerms | None:
    """What an outcome keeps of a decision; None unless it chose among predictions."""
    weights = decision.weights
    if decision.path not in FREE_PATHS or weights is None:
        return None
    logged = [_logged(c, c.prediction) for c in decision.candidates if c.prediction is not None]
    if not any(c.prediction.slm_id == decision.slm_id for c in logged):
        return None
    if not all(_is_finite(c) for c in logged):
        return None  # a store takes no NaN, and one row must not cost its batch
    # Stable: the chosen one first, then by score.
    logged.sort(key=lambda c: c.prediction.slm_id != decision.slm_id)
    return DecisionTerms(
        candidates=tuple(logged[:MAX_LOGGED]),
        weights=weights,
        left_out=max(len(logged) - MAX_LOGGED, 0),
        slo=decision.context.slo,
        quality_floor=decision.context.quality_floor,
    )


def read_decision(outcome: Outcome) -> LoggedDecision | None:
    """Rebuild the choice from an outcome; None when it was none among predicted candidates."""
    terms = outcome.decision.terms
    if terms is None or not outcome.features.numbers:
        return None
    return LoggedDecision(
        outcome=outcome,
        chosen=terms.candidates[0].prediction.slm_id,
        predictions=tuple((c.prediction, _state(c)) for c in terms.candidates),
        terms=terms,
    )


def rescore(
    logged: LoggedDecision, weights: Weights | None = None, values: PromptValues | None = None
) -> list[Candidate]:
    """The candidates, best first, under other weights or another predictor's values."""
    limit = _max_output_tokens(logged.outcome)
    return ranked(
        [
            evaluate(
                logged.slo,
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
    floor = max(quality_floor, logged.terms.quality_floor)
    order = above_floor(ranked, floor)
    chosen, _, _ = explore(order, logged.outcome.outcome_id, exploration_ratio)
    return chosen.slm_id


def _logged(candidate: Candidate, expected: Prediction) -> LoggedCandidate:
    factor = candidate.quality / expected.success_ratio if expected.success_ratio > 0.0 else 1.0
    return LoggedCandidate(
        # Field by field: `dataclasses.replace` costs several times as much.
        prediction=Prediction(
            expected.slm_id,
            round(expected.success_ratio, _DIGITS),
            round(expected.output_tokens, _DIGITS),
            round(expected.ttft_s, _DIGITS),
            round(expected.tpot_s, _DIGITS),
            round(expected.energy_j, _DIGITS),
            round(expected.ttft_spread, _DIGITS),
            round(expected.e2e_spread, _DIGITS),
        ),
        # Without a weight for switching this is not known, and makes no difference.
        hot=candidate.switching <= 0.0,
        calibration_factor=1.0 if abs(factor - 1.0) < 1e-9 else round(factor, _DIGITS),
    )


def _is_finite(candidate: LoggedCandidate) -> bool:
    p = candidate.prediction
    values = (p.success_ratio, p.output_tokens, p.ttft_s, p.tpot_s, p.energy_j)
    return math.isfinite(sum(values) + p.ttft_spread + p.e2e_spread + candidate.calibration_factor)


def _state(candidate: LoggedCandidate) -> SLMState:
    """As much of the SLM's state as scoring reads."""
    return SLMState(
        candidate.prediction.slm_id,
        residency=Residency.HOT if candidate.hot else Residency.ASLEEP,
        calibration_factor=candidate.calibration_factor,
    )


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
    logged = outcome.features.numbers[_MAX_OUTPUT_TOKENS]
    return float(round(math.expm1(logged))) if logged > 0.0 else math.inf
