"""What every baseline must keep to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.config import Goals
from calm_serve.config.goals import SelectionPolicyName
from calm_serve.requests.features import text_buckets
from calm_serve.routing.baselines import Baseline
from calm_serve.routing.factory import build
from calm_serve.testing import (
    make_context,
    make_fleet,
    make_goals,
    make_outcome,
    make_prediction,
    make_spec,
    make_state,
)
from calm_serve.types import Candidate, RoutingContext, SLMState
from tests.contract.strategies import CONTEXTS

IDS = ("broad", "large", "quick", "small")
FLEET = make_fleet(
    make_spec("broad", skills=["sql", "chat"], parameters=5, description="Anything at all."),
    make_spec("large", parameters=9, examples=["Who wrote this sonnet?"]),
    make_spec("quick", skills=["sql"], description="Question to SQL."),
    make_spec("small", parameters=1, description="Small talk."),
)
# Arguments of a policy; a new policy needs an entry only if it has more than its name.
PARAMETERS: dict[SelectionPolicyName, dict[str, object]] = {
    SelectionPolicyName.SINGLE: {"slm": "quick"},
    SelectionPolicyName.SHARES: {"shares": {"broad": 0.5, "quick": 0.3, "small": 0.1}},
}
POLICIES = [name for name in SelectionPolicyName if name is not SelectionPolicyName.CALM]
EVERY = pytest.mark.parametrize("name", POLICIES)

PREDICTIONS = st.builds(
    make_prediction,
    ttft_s=st.floats(1e-4, 100.0),
    tpot_s=st.floats(1e-5, 1.0),
    energy_j=st.floats(0.0, 1e4),
)
Situation = tuple[RoutingContext, Sequence[Candidate], Mapping[str, SLMState]]


def _situation(
    context: RoutingContext, ids: Sequence[str], predictions: Sequence[object], load: Sequence[int]
) -> Situation:
    candidates = [
        Candidate(i, prediction=make_prediction(i, ttft_s=p.ttft_s))  # type: ignore[attr-defined]
        for i, p in zip(ids, predictions, strict=False)
    ]
    # The states are of the whole fleet: those of excluded SLMs must not matter.
    states = {i: make_state(i, running=n) for i, n in zip(IDS, load, strict=True)}
    return context, candidates, states


SITUATIONS = st.builds(
    _situation,
    st.tuples(CONTEXTS, st.uuids()).map(lambda c: _named(*c)),
    st.permutations(IDS).flatmap(lambda o: st.integers(1, len(IDS)).map(lambda n: o[:n])),
    st.lists(PREDICTIONS, min_size=len(IDS), max_size=len(IDS)),
    st.lists(st.integers(0, 20), min_size=len(IDS), max_size=len(IDS)),
)
OUTCOMES = st.lists(
    st.builds(
        make_outcome,
        slm_id=st.sampled_from([*IDS, "gone"]),
        status=st.sampled_from(["ok", "error", "cancelled"]),
        e2e_s=st.none() | st.floats(0.0, 100.0),
        energy_j=st.none() | st.floats(0.0, 1e4),
    ),
    max_size=8,
)


def _named(context: RoutingContext, request_id: UUID) -> RoutingContext:
    object.__setattr__(context, "request_id", request_id.hex)
    return context


def policy(name: SelectionPolicyName) -> Baseline:
    goals: Goals = make_goals(policy={"name": name, **PARAMETERS.get(name, {})})
    found = build(goals, FLEET, text_buckets)
    assert found is not None
    return found


@EVERY
@given(SITUATIONS, OUTCOMES)
def test_every_candidate_is_ranked_once_and_no_other_slm(
    name: SelectionPolicyName, situation: Situation, outcomes: list[object]
) -> None:
    chooser = policy(name)
    for outcome in outcomes:
        chooser.observe(outcome)  # type: ignore[arg-type]
    ranking, propensity = chooser.choose(*situation)
    assert sorted(ranking) == sorted(c.slm_id for c in situation[1])
    assert 0.0 < propensity <= 1.0


@EVERY
@given(st.lists(SITUATIONS, min_size=1, max_size=4), OUTCOMES)
def test_the_same_history_gives_the_same_choices(
    name: SelectionPolicyName, situations: list[Situation], outcomes: list[object]
) -> None:
    first, second = policy(name), policy(name)
    for situation in situations:
        assert first.choose(*situation) == second.choose(*situation)
        for outcome in outcomes:
            first.observe(outcome)  # type: ignore[arg-type]
            second.observe(outcome)  # type: ignore[arg-type]


@EVERY
@given(SITUATIONS)
def test_the_order_of_the_candidates_does_not_matter(
    name: SelectionPolicyName, situation: Situation
) -> None:
    context, candidates, states = situation
    backwards = list(reversed(candidates))
    forward = policy(name).choose(context, candidates, states)
    assert policy(name).choose(context, backwards, states) == forward


@EVERY
@pytest.mark.parametrize("allowed", [IDS, IDS[:3], IDS[1:], ("large", "small")])
def test_an_slm_is_chosen_as_often_as_its_propensity(
    name: SelectionPolicyName, allowed: Sequence[str]
) -> None:
    chooser, count = policy(name), 4000
    candidates = [Candidate(i, prediction=make_prediction(i)) for i in allowed]
    states = {i: make_state(i) for i in IDS}
    chosen: Counter[str] = Counter()
    expected: dict[str, float] = {}
    for number in range(count):
        context = make_context(request_id=UUID(int=number * 0x9E3779B97F4A7C15 % 2**128).hex)
        (first, *_), propensity = chooser.choose(context, candidates, states)
        assert expected.setdefault(first, propensity) == propensity
        chosen[first] += 1
    assert sum(expected.values()) == pytest.approx(1.0)
    for slm_id, propensity in expected.items():
        # Four standard deviations of a share.
        slack = 4.0 * (propensity * (1.0 - propensity) / count) ** 0.5
        assert chosen[slm_id] / count == pytest.approx(propensity, abs=slack)


@EVERY
def test_a_policy_follows_the_fleet(name: SelectionPolicyName) -> None:
    chooser = policy(name)
    joined = make_spec("joined", skills=["sql"])
    chooser.set_fleet(make_fleet(FLEET.slms[0], joined))
    ids = ("broad", "joined")
    candidates = [Candidate(i, prediction=make_prediction(i)) for i in ids]
    ranking, _ = chooser.choose(make_context(), candidates, {i: make_state(i) for i in ids})
    assert sorted(ranking) == list(ids)


def test_calm_is_not_a_policy_to_compare_with() -> None:
    assert build(make_goals(), FLEET, text_buckets) is None
