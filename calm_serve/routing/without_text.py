"""The choice for requests that generate nothing: embeddings, ranking, and what a tokenizer answers.

Predictors, goals, rules and baselines are about answers in text, so none of them has a part here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calm_serve.config import Fleet, SLMSpec
from calm_serve.errors import RequestError
from calm_serve.prediction import prior_prediction
from calm_serve.routing import scoring
from calm_serve.routing.choice import Choice
from calm_serve.types import (
    Candidate,
    DecisionPath,
    DecisionReason,
    RoutingContext,
    SLMState,
    Task,
    Weights,
)


def choose(
    context: RoutingContext,
    specs: Mapping[str, SLMSpec],
    allowed: Sequence[str],
    states: Mapping[str, SLMState],
    weights: Weights,
) -> Choice:
    """Choose among the SLMs that may answer, at least one.

    What only a tokenizer answers goes to the first SLM of the file, because another one would count
    differently. All else goes by the priors of latency and energy at the present load.
    """
    if context.tokenizer_only:
        allowed = allowed[:1]
    scored = scoring.ranked([evaluate(context, specs[i], states[i], weights) for i in allowed])
    if context.tokenizer_only:
        first = DecisionReason.FIRST_LISTED
        return Choice(DecisionPath.LOAD, first, tuple(scored), tuple(allowed))
    several = len(scored) > 1
    return Choice(
        DecisionPath.LOAD,
        DecisionReason.BEST_PRIOR if several else DecisionReason.ONLY_CANDIDATE,
        tuple(scored),
        tuple(c.slm_id for c in scored),
        preferred=scoring.preferred(context.slo, scored, specs, states, weights, floor=0.0),
    )


def evaluate(
    context: RoutingContext, spec: SLMSpec, state: SLMState, weights: Weights
) -> Candidate:
    """Score one SLM; without a prediction where only its tokenizer works.

    A time measured there would say nothing of the SLM's prefill, which predictions are about.
    """
    if context.tokenizer_only:
        return Candidate(slm_id=spec.id, score=1.0)
    return scoring.evaluate(context.slo, prior_prediction(context, spec, state), state, weights)


def first_space(fleet: Fleet) -> str:
    """Return the vector space of the first embedding SLM of the file, "" without any."""
    return next((s.embedding_space for s in fleet.slms if s.task is Task.EMBED), "")


def check_tokenizer(context: RoutingContext, specs: Mapping[str, SLMSpec]) -> None:
    """Raise RequestError for token ids that could be read by more than one SLM's tokenizer."""
    if context.task is Task.EMBED:  # one space is one model
        return
    alike = [spec.id for spec in specs.values() if context.task in (spec.task, Task.ANY)]
    if len(alike) > 1:
        raise RequestError(
            "token ids mean something to one SLM's tokenizer only: name the SLM in 'model'",
            param="model",
        )
