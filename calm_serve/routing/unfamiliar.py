"""Stage 2 for unfamiliar prompts: by what is known of the SLMs, not by predictions for the prompt.

Nothing like the prompt was trained on, so P(success) of a specialist may be high by chance. The
generalists are ordered by their generality, then by their measured quality on unfamiliar prompts,
which starts from the prior and is learned from every label. Specialists get such a prompt by a rule
only, or when every generalist has failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from calm_serve.config import SLMSpec
from calm_serve.prediction import prior_quality
from calm_serve.routing import scoring
from calm_serve.routing.choice import Choice, Terms, best_of
from calm_serve.types import (
    Candidate,
    DecisionPath,
    DecisionReason,
    GeneralTerms,
    Novelty,
    RoutingContext,
    ServiceLevel,
    SLMState,
)

GENERALIST_ABOVE = 0.5  # generality
# The prior counts as so many labelled answers, so that the first ones do not decide alone.
PRIOR_ANSWERS = 4.0
_UNKNOWN = GeneralTerms(0.0, 0.0)  # of a decision that was logged without them


def general_terms(
    context: RoutingContext,
    specs: Sequence[SLMSpec],
    states: Sequence[SLMState],
    generality: Mapping[str, float],
) -> list[GeneralTerms]:
    """Return each SLM's generality, and its quality on unfamiliar prompts, shrunk to the prior."""
    found: list[GeneralTerms] = []
    for spec, state in zip(specs, states, strict=True):
        prior, answers = prior_quality(context, spec), state.unfamiliar_answers
        total = PRIOR_ANSWERS * prior + answers * state.unfamiliar_quality
        found.append(GeneralTerms(generality[spec.id], total / (PRIOR_ANSWERS + answers)))
    return found


def unfamiliar_order(
    ranked: Sequence[Candidate], slo: ServiceLevel, floor: float, default_slm: str
) -> list[Candidate]:
    """Return who may be chosen for an unfamiliar prompt, best first; [] leaves it to the score.

    These are the SLMs with a generality above GENERALIST_ABOVE; without one, `default_slm`. Those
    whose quality on unfamiliar prompts is below the floor come last; before them those that will
    probably miss the SLO, because a late answer is better than a specialist's wrong one. `ranked`
    are the candidates by score.
    """

    def key(candidate: Candidate) -> tuple[bool, bool, float, float, float, str]:
        general = candidate.general or _UNKNOWN
        expected = candidate.prediction
        missed = 0.0 if expected is None else scoring.slo_penalty(slo, expected)
        late = missed > scoring.SLO_PENALTY / 2.0
        rest = -general.generality, -general.quality, -candidate.score, candidate.slm_id
        return general.quality < floor, late, *rest

    found = [c for c in ranked if (c.general or _UNKNOWN).generality > GENERALIST_ABOVE]
    return sorted(found, key=key) or [c for c in ranked if c.slm_id == default_slm]


def choose(
    context: RoutingContext,
    scored: Sequence[Candidate],
    specs: Mapping[str, SLMSpec],
    states: Mapping[str, SLMState],
    terms: Terms,
    novelty: Novelty | None,
) -> Choice:
    """Choose by generality where the prompt's novelty outweighs every prediction, else by score."""
    is_unfamiliar = novelty is not None and novelty.outweighs(max(c.quality for c in scored))
    if is_unfamiliar:
        found = _by_generality(scoring.ranked(list(scored)), context, terms)
        if found is not None:
            return found
    choice = best_of(context, scored, specs, states, terms)
    if is_unfamiliar and choice.path is DecisionPath.SCORED:
        return replace(choice, reason=DecisionReason.UNFAMILIAR_NO_GENERALIST)
    return choice


def _by_generality(
    ranked: Sequence[Candidate], context: RoutingContext, terms: Terms
) -> Choice | None:
    """Choose the SLM for an unfamiliar prompt; None without a generalist and a `default_slm`.

    `ranked` are the candidates by score. Exploration stays among those that may be chosen. All
    others are failover targets, by score.
    """
    floor, default_slm = terms.floor, terms.default_slm
    slms = unfamiliar_order(ranked, context.slo, floor, default_slm)
    if not slms:
        return None
    chosen, propensity, explored = scoring.explore(
        slms, context.request_id, terms.exploration_ratio, context.slo
    )
    # A wake-up may be what makes an SLM late, so the SLO has no say in what is preferred.
    preferred = (
        "" if explored else unfamiliar_order(ranked, ServiceLevel(), floor, default_slm)[0].slm_id
    )
    ids = (chosen.slm_id, *(c.slm_id for c in slms), *(c.slm_id for c in ranked))
    reason = DecisionReason.EXPLORATION if explored else DecisionReason.UNFAMILIAR
    ranking = tuple(dict.fromkeys(ids))
    return Choice(DecisionPath.UNFAMILIAR, reason, tuple(ranked), ranking, propensity, preferred)
