"""A choice among SLMs, before it becomes a `Decision`: the best score, or a logged deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calm_serve.config import Goals, SLMSpec
from calm_serve.prediction import MetadataPrior, Predictor
from calm_serve.routing import scoring
from calm_serve.routing.conversations import with_cached_history
from calm_serve.types import (
    Candidate,
    Decision,
    DecisionPath,
    DecisionReason,
    GeneralTerms,
    Novelty,
    Prediction,
    RoutingContext,
    SLMState,
    Versions,
    Weights,
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidates, best first, the order in which they are asked, and why."""

    path: DecisionPath
    reason: DecisionReason
    candidates: tuple[Candidate, ...]
    ranking: tuple[str, ...]
    propensity: float = 1.0  # of the first of the ranking
    preferred: str = ""
    novelty: Novelty | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What a choice by score depends on beside the candidates."""

    weights: Weights
    floor: float  # least quality
    exploration_ratio: float
    default_slm: str
    is_prior: bool  # nothing was learned yet


def floor_of(context: RoutingContext, goals: Goals) -> float:
    """Return the least quality that the goals and the request ask for."""
    return max(goals.quality_floor, context.quality_floor)


def choice_terms(
    context: RoutingContext, goals: Goals, weights: Weights, predictor: Predictor
) -> Terms:
    """Return the terms of a choice among SLMs for a request."""
    return Terms(
        weights,
        floor_of(context, goals),
        # A tool loop whose SLM is not known goes where its first request went.
        0.0 if context.tool_loop else goals.exploration_ratio,
        goals.default_slm,
        is_prior=predictor.version == MetadataPrior.version,
    )


def score_all(
    context: RoutingContext,
    predictions: Sequence[Prediction],
    specs: Sequence[SLMSpec],
    states: Mapping[str, SLMState],
    weights: Weights,
    general: Sequence[GeneralTerms],
) -> list[Candidate]:
    """Score the predictions; `specs` and `general` run parallel to them."""
    return [
        scoring.evaluate(
            context.slo,
            with_cached_history(prediction, context, spec, states[spec.id]),
            states[spec.id],
            weights,
            scoring.language_factor(context, spec),
            terms,
        )
        for prediction, spec, terms in zip(predictions, specs, general, strict=True)
    ]


def best_of(
    context: RoutingContext,
    scored: Sequence[Candidate],
    specs: Mapping[str, SLMSpec],
    states: Mapping[str, SLMState],
    terms: Terms,
) -> Choice:
    """Choose the best score at or above the quality floor, or explore."""
    candidates = scoring.ranked(list(scored))
    order = scoring.above_floor(candidates, terms.floor)
    chosen, propensity, explored = scoring.explore(
        order, context.request_id, terms.exploration_ratio, context.slo
    )
    path = DecisionPath.PRIOR if terms.is_prior else DecisionPath.SCORED
    reason = DecisionReason.BEST_PRIOR if terms.is_prior else DecisionReason.BEST_SCORE
    preferred = ""
    if explored:
        path, reason = DecisionPath.EXPLORED, DecisionReason.EXPLORATION
    else:
        preferred = scoring.preferred(
            context.slo, candidates, specs, states, terms.weights, terms.floor
        )
        if len(order) == 1:
            reason = DecisionReason.ONLY_CANDIDATE
    ranking = (chosen.slm_id, *(c.slm_id for c in order if c is not chosen))
    return Choice(path, reason, tuple(candidates), ranking, propensity, preferred)


def record(
    context: RoutingContext,
    choice: Choice,
    excluded: Sequence[Candidate],
    versions: Versions,
    weights: Weights,
    *,
    rule: str = "",
    adapter: str = "",
    unscored: tuple[str, ...] = (),
) -> Decision:
    """Return the decision for a choice; the keywords are fields of the record."""
    return Decision(
        decision_id=context.request_id,
        slm_id=choice.ranking[0],
        adapter=adapter,
        path=choice.path,
        reason=choice.reason,
        rule=rule,
        propensity=choice.propensity,
        candidates=(*choice.candidates, *excluded),
        ranking=choice.ranking,
        context=context,
        versions=versions,
        weights=weights if choice.candidates[0].prediction else None,
        preferred=choice.preferred or choice.ranking[0],
        novelty=choice.novelty,
        unscored=unscored,
    )


def plain(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain data for JSON."""
    found = asdict(decision)
    found["versions"]["predictor"] = str(decision.versions.predictor)
    return found
