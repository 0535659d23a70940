"""What every predictor must keep to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.config import SLMSpec
from calm_serve.learning.training import train
from calm_serve.prediction.base import MetadataPrior, Predictor, prior_prediction
from calm_serve.prediction.lightgbm import LightGBMPredictor
from calm_serve.testing import make_spec
from calm_serve.types import Prediction, Residency, RoutingContext, SLMState
from tests.contract.strategies import CONTEXTS, STATES
from tests.knowledge_data import CODER, TALKER, make_context, make_state, make_world

UNSEEN = "unseen"


@cache
def _trained() -> LightGBMPredictor:
    training = train(
        make_world(300), [CODER, TALKER], seed=1, holdout_ratio=0.25, clock=lambda: 0.0
    )
    return LightGBMPredictor.from_bytes(training.artifact.to_bytes(), MetadataPrior())


# A new predictor is added here and inherits everything below.
PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "metadata prior": MetadataPrior,
    "lightgbm": _trained,
}
EVERY = pytest.mark.parametrize("make", PREDICTORS.values(), ids=PREDICTORS.keys())

SPECS = {
    i: make_spec(i, skills=["sql"], priors={"quality": q, "skill_quality": 0.9})
    for i, q in ((CODER, 0.4), (TALKER, 0.5), (UNSEEN, 0.6))
}
SITUATIONS = st.permutations(list(SPECS.values())).flatmap(
    lambda order: st.tuples(
        st.integers(0, len(order)).map(lambda n: order[:n]),
        st.lists(STATES, min_size=len(order), max_size=len(order)),
    )
)


def predict(
    predictor: Predictor, context: RoutingContext, specs: list[SLMSpec], states: list[SLMState]
) -> list[Prediction]:
    return predictor.predict(context, specs, states[: len(specs)])


@EVERY
@given(CONTEXTS, SITUATIONS)
def test_one_prediction_per_spec_in_order_and_every_value_sane(
    make: Callable[[], Predictor],
    context: RoutingContext,
    situation: tuple[list[SLMSpec], list[SLMState]],
) -> None:
    specs, states = situation
    found = predict(make(), context, specs, states)
    assert [p.slm_id for p in found] == [s.id for s in specs]
    for prediction in found:
        assert 0.0 <= prediction.success_ratio <= 1.0
        for positive in (prediction.output_tokens, prediction.ttft_s, prediction.tpot_s):
            assert 0.0 < positive < math.inf
        assert 0.0 <= prediction.energy_j < math.inf
        assert prediction.e2e_s >= prediction.ttft_s
        if context.max_output_tokens is not None:
            assert prediction.output_tokens <= context.max_output_tokens


@EVERY
@given(CONTEXTS, SITUATIONS)
def test_equal_input_gives_equal_output_and_inputs_stay_as_they_were(
    make: Callable[[], Predictor],
    context: RoutingContext,
    situation: tuple[list[SLMSpec], list[SLMState]],
) -> None:
    predictor, (specs, states) = make(), situation
    before = repr((context, specs, states))
    first = predict(predictor, context, specs, states)
    predict(predictor, make_context(code=True), list(SPECS.values()), states)
    assert predict(predictor, context, specs, states) == first
    assert repr((context, specs, states)) == before


@EVERY
@given(CONTEXTS, SITUATIONS)
def test_a_candidate_is_predicted_the_same_alone_as_among_others(
    make: Callable[[], Predictor],
    context: RoutingContext,
    situation: tuple[list[SLMSpec], list[SLMState]],
) -> None:
    predictor, (specs, states) = make(), situation
    together = predict(predictor, context, specs, states)
    alone = [predictor.predict(context, [s], [t])[0] for s, t in zip(specs, states, strict=False)]
    assert together == alone


@EVERY
@given(CONTEXTS, STATES)
def test_an_slm_never_seen_gets_its_prior_and_at_most_its_quality(
    make: Callable[[], Predictor], context: RoutingContext, state: SLMState
) -> None:
    spec = SPECS[UNSEEN]
    (found,) = make().predict(context, [spec], [state])
    prior = prior_prediction(context, spec, state)
    assert found.success_ratio <= prior.success_ratio
    assert replace(found, success_ratio=prior.success_ratio) == prior


@EVERY
@given(CONTEXTS, STATES, st.sampled_from([CODER, TALKER, UNSEEN]))
def test_waking_an_slm_up_never_makes_it_faster(
    make: Callable[[], Predictor], context: RoutingContext, state: SLMState, slm_id: str
) -> None:
    load = {
        "running": state.running,
        "waiting": state.waiting,
        "capacity": state.capacity,
        "wake_s": state.wake_s,
    }
    awake = make_state(slm_id, **load)
    asleep = make_state(slm_id, residency=Residency.COLD, **load)
    predictor, spec = make(), SPECS[slm_id]
    (fast,) = predictor.predict(context, [spec], [awake])
    (slow,) = predictor.predict(context, [spec], [asleep])
    assert slow.ttft_s >= fast.ttft_s


@EVERY
def test_a_predictor_names_its_version(make: Callable[[], Predictor]) -> None:
    assert make().version


@EVERY
def test_no_candidates_give_no_predictions(make: Callable[[], Predictor]) -> None:
    assert make().predict(make_context(code=False), [], []) == []


def test_only_the_prior_calls_itself_the_prior() -> None:
    assert _trained().version != MetadataPrior.version


def test_the_trained_predictor_is_not_the_prior_in_disguise() -> None:
    specs, states = [SPECS[CODER], SPECS[TALKER]], [make_state(CODER), make_state(TALKER)]
    coder, talker = _trained().predict(make_context(code=True), specs, states)
    assert coder.success_ratio > talker.success_ratio
    coder, talker = _trained().predict(make_context(code=False), specs, states)
    assert coder.success_ratio < talker.success_ratio
