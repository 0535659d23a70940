"""What every filter, every rule and every objective must keep to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.config import Goals, Rule, SLMSpec
from calm_serve.routing import scoring
from calm_serve.routing.filters import (
    FILTERS,
    PINNED_FILTERS,
    Filter,
    excluded_by,
    is_plain,
)
from calm_serve.routing.rules import first_match, matches
from calm_serve.routing.scoring import weights_of
from calm_serve.testing import make_context, make_goals, make_state
from calm_serve.types import Candidate, Prediction, Residency, RoutingContext, SLMState
from tests.contract.strategies import CONTEXTS, RATIO, STATES, specs

Objective = Callable[[RoutingContext, Prediction, SLMState, Goals], Candidate]

# A new objective is added here and inherits everything below.
OBJECTIVES: list[Objective] = [scoring.evaluate]

# One entry per condition a rule can state, each with values that match some contexts.
CONDITIONS: list[dict[str, Any]] = [
    {"marker": "sql"},
    {"without": ("code", "math")},
    {"output_shape": "json"},
    {"language": "de"},
    {"min_prompt_chars": 1000},
    {"max_prompt_chars": 5000},
]

PREDICTIONS = st.builds(
    Prediction,
    slm_id=st.just("small"),
    success_ratio=RATIO,
    output_tokens=st.floats(1.0, 1e4),
    ttft_s=st.floats(1e-4, 100.0),
    tpot_s=st.floats(1e-5, 1.0),
    energy_j=st.floats(0.0, 1e4),
)
GOALS = st.builds(
    make_goals,
    latency_weight_per_s=st.floats(0.0, 100.0),
    energy_weight_per_j=st.floats(0.0, 100.0),
    switching_weight=st.floats(0.0, 100.0),
)


@pytest.mark.parametrize("keep", FILTERS.values(), ids=FILTERS.keys())
@given(CONTEXTS, specs(), STATES)
def test_a_filter_answers_yes_or_no_to_everything_and_always_the_same(
    keep: Filter, context: RoutingContext, spec: SLMSpec, state: SLMState
) -> None:
    first = keep(context, spec, state)
    assert first in (True, False)
    assert keep(context, spec, state) is first


@pytest.mark.parametrize("name", FILTERS)
@given(CONTEXTS, specs(), STATES)
def test_what_one_filter_refuses_is_excluded_whatever_the_others_accept(
    name: str, context: RoutingContext, spec: SLMSpec, state: SLMState
) -> None:
    if not FILTERS[name](context, spec, state):
        assert excluded_by(context, spec, state)
        if name in PINNED_FILTERS:
            assert excluded_by(context, spec, state, pinned=True)


@given(CONTEXTS, specs(), STATES)
def test_an_slm_is_excluded_by_the_first_filter_that_refuses_it(
    context: RoutingContext, spec: SLMSpec, state: SLMState
) -> None:
    refusing = [n for n, keep in FILTERS.items() if not keep(context, spec, state)]
    assert excluded_by(context, spec, state) == (refusing[0] if refusing else "")
    if is_plain(context):
        assert excluded_by(context, spec, state, plain=True) == (refusing[0] if refusing else "")


def test_every_condition_of_the_configuration_is_listed() -> None:
    listed = {name for condition in CONDITIONS for name in condition}
    assert listed == set(Rule.model_fields) - {"name", "slms"}


def rule(*conditions: dict[str, Any]) -> Rule:
    merged = {name: value for c in conditions for name, value in c.items()}
    return Rule(name="r", slms=("small",), **merged)


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: next(iter(c)))
@given(CONTEXTS)
def test_a_condition_only_narrows_a_rule(
    condition: dict[str, Any], context: RoutingContext
) -> None:
    assert matches(rule(), context)
    for other in CONDITIONS:
        both = matches(rule(other, condition), context)
        assert both == (matches(rule(other), context) and matches(rule(condition), context))


@given(CONTEXTS, st.permutations(range(len(CONDITIONS))))
def test_the_first_rule_that_matches_in_their_order_is_taken(
    context: RoutingContext, order: list[int]
) -> None:
    rules = tuple(rule(CONDITIONS[i]).model_copy(update={"name": f"r{i}"}) for i in order)
    found = first_match(rules, context)
    before = list(itertools.takewhile(lambda r: r is not found, rules))
    assert not any(matches(r, context) for r in before)
    assert found is None or matches(found, context)


@pytest.mark.parametrize("evaluate", OBJECTIVES)
@given(CONTEXTS, PREDICTIONS, STATES, GOALS, st.floats(0.01, 10.0))
def test_the_score_falls_with_every_cost_and_rises_with_quality(
    evaluate: Objective,
    context: RoutingContext,
    prediction: Prediction,
    state: SLMState,
    goals: Goals,
    more: float,
) -> None:
    def score(changed: Prediction, at: SLMState = state) -> float:
        return evaluate(context.slo, changed, at, weights_of(goals)).score

    base = score(prediction)
    better = min(prediction.success_ratio + more, 1.0)
    assert score(replace(prediction, success_ratio=better)) >= base
    for cost in ("ttft_s", "tpot_s", "energy_j", "output_tokens"):
        assert score(replace(prediction, **{cost: getattr(prediction, cost) + more})) <= base
    awake = score(prediction, replace(state, residency=Residency.HOT))
    assert awake >= score(prediction, replace(state, residency=Residency.COLD))


@pytest.mark.parametrize("evaluate", OBJECTIVES)
@given(CONTEXTS, PREDICTIONS, STATES, GOALS)
def test_the_score_is_the_sum_of_the_terms_that_the_explanation_shows(
    evaluate: Objective,
    context: RoutingContext,
    prediction: Prediction,
    state: SLMState,
    goals: Goals,
) -> None:
    shown = evaluate(context.slo, prediction, state, weights_of(goals))
    total = shown.quality - shown.latency - shown.energy - shown.switching
    assert shown.score == pytest.approx(total)
    assert min(shown.latency, shown.energy, shown.switching) >= 0.0
    assert (shown.slm_id, shown.prediction) == (prediction.slm_id, prediction)


@pytest.mark.parametrize("evaluate", OBJECTIVES)
@given(PREDICTIONS, st.floats(0.1, 10.0), GOALS)
def test_weights_come_from_the_goals_and_enter_linearly(
    evaluate: Objective, prediction: Prediction, factor: float, goals: Goals
) -> None:
    # Without an SLO, because its penalty is in quality points and has no weight.
    context, cold = make_context(), make_state(residency=Residency.COLD)
    one = evaluate(context.slo, prediction, cold, weights_of(goals))
    scaled = evaluate(
        context.slo,
        prediction,
        cold,
        weights_of(
            goals.model_copy(
                update={
                    "latency_weight_per_s": goals.latency_weight_per_s * factor,
                    "energy_weight_per_j": goals.energy_weight_per_j * factor,
                    "switching_weight": goals.switching_weight * factor,
                }
            )
        ),
    )
    assert scaled.latency == pytest.approx(one.latency * factor)
    assert scaled.energy == pytest.approx(one.energy * factor)
    assert scaled.switching == pytest.approx(one.switching * factor)
    free = make_goals(latency_weight_per_s=0, energy_weight_per_j=0, switching_weight=0)
    assert (
        evaluate(context.slo, prediction, cold, weights_of(free)).score == prediction.success_ratio
    )


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        slm_id=st.sampled_from([f"slm{i}" for i in range(6)]),
        score=st.sampled_from([-1.0, 0.0, 0.5]) | st.floats(-10, 1),
        quality=RATIO,
    ),
    unique_by=lambda c: c.slm_id,
    min_size=1,
)


@given(CANDIDATES, st.randoms())
def test_ranking_is_a_total_order_that_does_not_depend_on_the_input_order(
    candidates: list[Candidate], dice: Any
) -> None:
    order = scoring.ranked(candidates)
    shuffled = list(candidates)
    dice.shuffle(shuffled)
    assert scoring.ranked(shuffled) == order
    assert scoring.ranked(order) == order
    assert sorted(c.slm_id for c in order) == sorted(c.slm_id for c in candidates)
    assert all(a.score >= b.score for a, b in itertools.pairwise(order))


@given(CANDIDATES, RATIO)
def test_the_quality_floor_always_leaves_a_candidate(
    candidates: list[Candidate], floor: float
) -> None:
    kept = scoring.above_floor(candidates, floor)
    assert kept
    above = [c for c in candidates if c.quality >= floor]
    assert kept == above or (not above and len(kept) == 1)
