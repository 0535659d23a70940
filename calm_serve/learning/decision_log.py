"""The log of scored decisions, and their replay under other goals or another predictor.

P(success) and answer length can be computed from the logged prompt features; latency and energy of
an SLM also depend on the fleet's state at that moment, which cannot be rebuilt later. So the
prediction of every candidate is logged (`types.DecisionTerms`). A replayed decision keeps the
logged TTFT, TPOT and joules per token, and may replace the rest: other weights, another predictor's
P(success) and lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from calm_serve.requests import NUMBER_NAMES
from calm_serve.routing import above_floor, evaluate, explore, ranked, unfamiliar_order
from calm_serve.types import (
    FREE_PATHS,
    Candidate,
    Decision,
    DecisionTerms,
    GeneralTerms,
    LoggedCandidate,
    Novelty,
    Outcome,
    Prediction,
    PredictorVersion,
    Residency,
    ServiceLevel,
    SLMState,
    Weights,
)

MAX_LOGGED = 32  # candidates of one decision; bounds a row of the log
_DIGITS = 6  # decimals: microseconds, microjoules
_MIN_FACTOR_CHANGE = 1e-9  # a smaller deviation from 1 is a rounding error
_MAX_OUTPUT_TOKENS = NUMBER_NAMES.index("log_max_output_tokens")

# SLM -> P(success) and output tokens; None keeps the logged value.
PromptValues = Mapping[str, tuple[float | None, float | None]]


class PromptPredictor(Protocol):
    """A predictor as a replay uses it: from logged features alone."""

    version: PredictorVersion

    def of_prompt(
        self, numbers: Sequence[float], buckets: Sequence[int]
    ) -> dict[str, tuple[float | None, float | None]]:
        """P(success) and output tokens by SLM; None where it does not know them."""
        ...

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        """How unlike its training prompts a prompt with these bits is; None if unknown."""
        ...


@dataclass(frozen=True, slots=True)
class LoggedDecision:
    """A logged choice among predicted candidates."""

    outcome: Outcome
    chosen: str  # SLM of the decision; after a failover another one answered
    predictions: tuple[tuple[Prediction, SLMState], ...]  # the chosen one first
    terms: DecisionTerms

    @property
    def weights(self) -> Weights:
        """Weights of the scores."""
        return self.terms.weights

    @property
    def slo(self) -> ServiceLevel:
        """The request's service level objectives."""
        return self.terms.slo

    @property
    def complete(self) -> bool:
        """Whether every candidate was logged."""
        return not self.terms.left_out


def decision_terms(decision: Decision) -> DecisionTerms | None:
    """The part of a decision that an outcome logs; None unless it chose among predictions."""
    weights = decision.weights
    if decision.path not in FREE_PATHS or weights is None:
        return None
    logged = [_logged(c, c.prediction) for c in decision.candidates if c.prediction is not None]
    if not any(c.prediction.slm_id == decision.slm_id for c in logged):
        return None
    if not all(_is_finite(c) for c in logged):
        return None  # a store refuses NaN, and one row must not lose its batch
    # The sort is stable: the chosen candidate first, then by score.
    logged.sort(key=lambda c: c.prediction.slm_id != decision.slm_id)
    return DecisionTerms(
        candidates=tuple(logged[:MAX_LOGGED]),
        weights=weights,
        left_out=max(len(logged) - MAX_LOGGED, 0),
        slo=decision.context.slo,
        quality_floor=decision.context.quality_floor,
    )


def read_decision(outcome: Outcome) -> LoggedDecision | None:
    """Rebuild the choice from an outcome; None when it did not choose among predictions."""
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
    """The candidates, best first, with other weights or another predictor's values."""
    limit = _max_output_tokens(logged.outcome)
    return ranked(
        [
            evaluate(
                logged.slo,
                _updated(prediction, (values or {}).get(prediction.slm_id), limit),
                state,
                weights or logged.weights,
                general=candidate.general,
            )
            for candidate, (prediction, state) in zip(
                logged.terms.candidates, logged.predictions, strict=True
            )
        ]
    )


def redecide(
    logged: LoggedDecision,
    ranked: list[Candidate],
    quality_floor: float = 0.0,
    exploration_ratio: float = 0.0,
    *,
    default_slm: str = "",
    predictor: PromptPredictor | None = None,
) -> str:
    """The SLM that is chosen from `rescore`'s candidates.

    `quality_floor` and `default_slm` are those of the goals; the request's floor is in the log.
    With an `exploration_ratio` the draw is that of the logged decision. Whether the prompt is
    unfamiliar is for `predictor` to say, else it is as logged.
    """
    floor, order = max(quality_floor, logged.terms.quality_floor), list[Candidate]()
    decision = logged.outcome.decision
    novelty = decision.novelty
    if predictor is not None:
        novelty = predictor.novelty(logged.outcome.features.bits)
    best = max(c.quality for c in ranked)
    if novelty is not None and novelty.outweighs(best) and not decision.rule:
        order = unfamiliar_order(ranked, logged.slo, floor, default_slm)
    order = order or above_floor(ranked, floor)
    chosen, _, _ = explore(order, logged.outcome.outcome_id, exploration_ratio, logged.slo)
    return chosen.slm_id


def _logged(candidate: Candidate, expected: Prediction) -> LoggedCandidate:
    general = candidate.general
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
        # If the weight of switching is 0, this is always True; the tier then has no effect.
        hot=candidate.switching <= 0.0,
        calibration_factor=1.0
        if abs(factor - 1.0) < _MIN_FACTOR_CHANGE
        else round(factor, _DIGITS),
        general=general
        and GeneralTerms(round(general.generality, _DIGITS), round(general.quality, _DIGITS)),
    )


def _is_finite(candidate: LoggedCandidate) -> bool:
    p = candidate.prediction
    values = (p.success_ratio, p.output_tokens, p.ttft_s, p.tpot_s, p.energy_j)
    return math.isfinite(sum(values) + p.ttft_spread + p.e2e_spread + candidate.calibration_factor)


def _state(candidate: LoggedCandidate) -> SLMState:
    """The part of the SLM's state that scoring reads."""
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
