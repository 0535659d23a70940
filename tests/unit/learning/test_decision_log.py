"""A choice is the same when it is replayed from the log."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calm_serve.config import Goals
from calm_serve.knowledge.columns import from_columns, to_columns
from calm_serve.learning.decision_log import (
    MAX_LOGGED,
    decision_terms,
    read_decision,
    redecide,
    rescore,
)
from calm_serve.learning.training import train
from calm_serve.prediction.base import MetadataPrior
from calm_serve.prediction.lightgbm import LightGBMPredictor
from calm_serve.requests.features import NUMBER_NAMES
from calm_serve.routing.scoring import weights_of
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import change_outcome, decision_for, make_decision, make_prediction
from calm_serve.types import Candidate, DecisionPath, Outcome, ServiceLevel, Weights
from tests.knowledge_data import (
    CODER,
    TALKER,
    make_context,
    make_fleet,
    make_spec,
    make_state,
    make_world,
)
from tests.logged_decisions import serve

WEIGHTS = Weights(0.1, 0.002, 0.05)


def stored(outcome: Outcome) -> Outcome:
    """The outcome as the store keeps and returns it."""
    columns = json.loads(json.dumps(to_columns(outcome)))
    return from_columns(columns, outcome.signals)


def learned() -> LightGBMPredictor:
    training = train(
        make_world(300), (CODER, TALKER), seed=0, holdout_ratio=0.25, clock=lambda: 0.0
    )
    return LightGBMPredictor(training.artifact, MetadataPrior())


@pytest.mark.parametrize("goals", [Goals(), Goals(exploration_ratio=0.3, quality_floor=0.4)])
@pytest.mark.parametrize(
    "context", [{}, {"slo": ServiceLevel(ttft_ms=100.0)}, {"quality_floor": 0.6}]
)
def test_the_same_goals_and_predictions_choose_the_same(
    goals: Goals, context: dict[str, Any]
) -> None:
    for outcome in serve(120, goals, learned(), **context):
        logged = read_decision(outcome)
        assert logged is not None
        again = redecide(logged, rescore(logged), goals.quality_floor, goals.exploration_ratio)
        assert again == logged.chosen == outcome.slm_id


def test_a_predictor_predicts_the_same_from_the_log_as_at_the_decision() -> None:
    predictor = learned()
    for outcome in serve(40, Goals(), predictor):
        logged = read_decision(outcome)
        assert logged is not None
        again = rescore(
            logged, values=predictor.of_prompt(outcome.features.numbers, outcome.features.buckets)
        )
        for new, old in zip(again, rescore(logged), strict=True):
            assert new.slm_id == old.slm_id
            assert new.quality == pytest.approx(old.quality, abs=2e-6)
            assert new.score == pytest.approx(old.score, abs=1e-5)


def test_prompt_heads_predict_the_same_from_the_log_as_live() -> None:
    predictor, context = learned(), make_context(code=True)
    specs = [make_spec(CODER), make_spec("unknown")]
    live = predictor.predict(context, specs, [make_state(s.id, waiting=3) for s in specs])
    offline = predictor.of_prompt(context.features.numbers, context.features.buckets)
    assert offline[CODER] == (live[0].success_ratio, live[0].output_tokens)
    assert set(offline) == {CODER, TALKER}


def test_other_goals_choose_as_a_selector_with_those_goals() -> None:
    was, now = Goals(exploration_ratio=0.0), Goals(exploration_ratio=0.0, latency_weight_per_s=5.0)
    old, new = serve(100, was, learned()), serve(100, now, learned())
    assert [o.slm_id for o in old] != [o.slm_id for o in new]
    for logged, other in zip(map(read_decision, old), new, strict=True):
        assert logged is not None
        assert redecide(logged, rescore(logged, weights_of(now))) == other.slm_id


def test_a_shorter_answer_costs_less_and_respects_the_limit_of_the_request() -> None:
    (outcome,) = serve(1, Goals())
    logged = read_decision(outcome)
    assert logged is not None
    (before,) = [c.prediction for c in rescore(logged) if c.slm_id == CODER]
    limited = list(outcome.features.numbers)
    limited[NUMBER_NAMES.index("log_max_output_tokens")] = 3.4339872044851463  # log(1 + 30)
    capped = read_decision(change_outcome(outcome, numbers=tuple(limited)))
    assert before is not None and capped is not None
    (after,) = [
        c.prediction for c in rescore(capped, values={CODER: (None, 500.0)}) if c.slm_id == CODER
    ]
    assert after is not None
    assert after.output_tokens == 30.0
    assert after.energy_j == pytest.approx(before.energy_j * 30.0 / before.output_tokens)
    assert after.success_ratio == before.success_ratio


def test_a_calibration_factor_survives_the_log() -> None:
    decision = make_decision(
        "a",
        candidates=(
            Candidate("a", prediction=make_prediction("a", success_ratio=0.8), quality=0.2),
            Candidate("b", prediction=make_prediction("b", success_ratio=0.8), quality=0.8),
        ),
        weights=WEIGHTS,
    )
    terms = decision_terms(decision)
    (outcome,) = serve(1, Goals())
    logged = read_decision(change_outcome(outcome, terms=terms))
    assert logged is not None
    assert {c.slm_id: c.quality for c in rescore(logged)} == {"a": 0.2, "b": 0.8}
    halved = rescore(logged, values={"a": (0.4, None)})
    assert {c.slm_id: c.quality for c in halved} == {"a": 0.1, "b": 0.8}


@pytest.mark.parametrize("path", [DecisionPath.PINNED, DecisionPath.RULE])
def test_only_choices_among_predictions_are_logged(path: DecisionPath) -> None:
    assert decision_terms(make_decision("a", "b", path=path, weights=WEIGHTS)) is None


@pytest.mark.parametrize(
    "weights", [Weights(0.0, 0.0, 0.0), Weights(0.1, 0.2, 0.3, 1.5, 0.0, 0.0, 2.0, 0.4)]
)
def test_all_weights_that_a_controller_may_set_are_logged(weights: Weights) -> None:
    (outcome,) = serve(1, Goals())
    terms = decision_terms(make_decision("a", "b", weights=weights))
    logged = read_decision(stored(change_outcome(outcome, terms=terms)))
    assert logged is not None and logged.weights == weights


def test_a_prediction_that_is_not_finite_costs_its_row_and_not_the_batch() -> None:
    endless = Candidate("a", prediction=make_prediction("a", ttft_s=float("inf")))
    assert decision_terms(make_decision("a", candidates=(endless,), weights=WEIGHTS)) is None


def test_the_logged_candidates_are_bounded_and_the_rest_counted() -> None:
    names = [f"slm-{i}" for i in range(MAX_LOGGED + 8)]
    decision = make_decision(names[-1], *names[:-1], weights=WEIGHTS)
    terms = decision_terms(decision)
    assert terms is not None
    assert len(terms.candidates) == MAX_LOGGED
    assert terms.candidates[0].prediction.slm_id == names[-1]
    (outcome,) = serve(1, Goals())
    logged = read_decision(change_outcome(outcome, terms=terms))
    assert logged is not None and not logged.complete


def test_a_logged_choice_survives_the_store_and_stays_small() -> None:
    (outcome,) = serve(1, Goals(), learned())
    assert len(json.dumps(to_columns(outcome)["terms"])) < 125 * 2 + 420
    assert read_decision(stored(outcome)) == read_decision(outcome)


def test_an_outcome_without_terms_is_no_logged_choice() -> None:
    assert read_decision(make_world(1)[0]) is None


def test_the_selectors_decision_is_what_is_logged() -> None:
    decision = decision_for(ModelSelector(make_fleet(), Goals()), make_context(code=True))
    terms = decision_terms(decision)
    assert terms is not None
    names = [c.prediction.slm_id for c in terms.candidates]
    assert names[0] == decision.slm_id
    assert set(names) == {CODER, TALKER}
