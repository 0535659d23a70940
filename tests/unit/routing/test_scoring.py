"""Scoring: SLO penalties, the quality floor and exploration."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.routing.scoring import (
    EXPLORED_LATENCY,
    NO_SLO,
    SLO_PENALTY,
    above_floor,
    evaluate,
    explore,
    ranked,
    reward,
    slo_penalty,
    weights_of,
)
from calm_serve.testing import make_goals, make_prediction, make_state
from calm_serve.types import Candidate, Residency, ServiceLevel, Weights


def candidate(slm_id: str, score: float = 0.5, **fields: float) -> Candidate:
    return Candidate(slm_id, score=score, **fields)  # type: ignore[arg-type]


def test_the_score_is_the_weighted_sum_of_its_terms() -> None:
    goals = make_goals(latency_weight_per_s=0.1, energy_weight_per_j=0.01, switching_weight=0.05)
    prediction = make_prediction(
        success_ratio=0.8, output_tokens=11, ttft_s=0.5, tpot_s=0.05, energy_j=4.0
    )
    cold = make_state(residency=Residency.COLD)
    scored = evaluate(ServiceLevel(), prediction, cold, weights_of(goals))
    assert scored.quality == 0.8
    assert scored.latency == pytest.approx(0.1)  # one second
    assert scored.energy == pytest.approx(0.04)
    assert scored.switching == 0.05
    assert scored.score == pytest.approx(0.61)
    assert evaluate(ServiceLevel(), prediction, make_state(), weights_of(goals)).switching == 0.0


@pytest.mark.parametrize(
    "weights",
    [
        Weights(0.1, 0.02, 0.05),
        Weights(0.1, 0.02, 0.05, 2.0, 0.3, 0.2, 0.4, 1.0),
        Weights(0.0, 0.0, 0.0),
    ],
)
def test_the_reward_of_arrays_is_that_of_each_of_their_rows(weights: Weights) -> None:
    random = np.random.default_rng(0)
    columns = random.random((5, 50))
    columns[2, 7] = columns[0, 9] = np.nan  # not measured
    together = reward(weights, *columns)
    for row in range(50):
        alone = reward(weights, *(float(value) for value in columns[:, row]))
        assert alone == pytest.approx([float(a[row]) for a in together], rel=0, abs=0, nan_ok=True)


def test_the_score_is_the_reward_less_the_switching() -> None:
    weights = Weights(0.1, 0.01, 0.05, 1.5, 0.3, 0.2, 0.4, 0.1)
    prediction = make_prediction(success_ratio=0.8, ttft_s=0.5, energy_j=4.0)
    slo = ServiceLevel(ttft_ms=400.0)
    scored = evaluate(slo, prediction, make_state(residency=Residency.COLD), weights)
    terms = (prediction.ttft_s, prediction.e2e_s, prediction.energy_j)
    value, latency, energy = reward(weights, 0.8, *terms, slo_penalty(slo, prediction))
    assert (scored.score, scored.latency, scored.energy) == (value - 0.05, latency, energy)


@pytest.mark.parametrize(
    ("slo", "share"),
    [
        ({}, 0.0),
        ({"ttft_ms": 50.0}, 0.5),
        ({"ttft_ms": 50.0 * math.e**0.4}, 0.1587),  # one spread of headroom
        ({"ttft_ms": 50.0 / math.e**0.8}, 0.9772),
        ({"ttft_ms": 1.0}, 1.0),
        ({"tpot_ms": 10.0}, 0.5),
        ({"deadline_s": 0.68 * math.e**0.2}, 0.1587),
        ({"deadline_s": 0.34}, 0.9997),
        ({"ttft_ms": 50.0, "deadline_s": 100.0}, 0.5),
    ],
)
def test_a_slo_costs_by_the_probability_of_missing_it(slo: dict[str, float], share: float) -> None:
    prediction = make_prediction(
        ttft_s=0.05, tpot_s=0.01, output_tokens=64, ttft_spread=0.4, e2e_spread=0.2
    )
    penalty = slo_penalty(ServiceLevel(**slo), prediction)
    assert penalty == pytest.approx(SLO_PENALTY * share, abs=1e-4)


def test_an_slm_whose_times_are_uncertain_is_the_worse_bet_with_headroom() -> None:
    slo = ServiceLevel(ttft_ms=100.0)
    steady, uneven = (make_prediction(ttft_s=0.05, ttft_spread=s) for s in (0.1, 0.8))
    assert slo_penalty(slo, steady) < slo_penalty(slo, uneven)


def test_predictions_of_no_time_at_all_miss_nothing() -> None:
    assert slo_penalty(ServiceLevel(ttft_ms=1.0), make_prediction(ttft_s=0.0)) == 0.0


def test_the_floor_keeps_those_above_it_and_else_the_best_one() -> None:
    low, high = candidate("low", quality=0.3), candidate("high", quality=0.6)
    assert above_floor([low, high], 0.0) == [low, high]
    assert above_floor([low, high], 0.5) == [high]
    assert above_floor([low, high], 0.9) == [high]


def test_equal_scores_are_ordered_by_id() -> None:
    assert [c.slm_id for c in ranked([candidate("b"), candidate("a"), candidate("c", 0.6)])] == [
        "c",
        "a",
        "b",
    ]


@given(st.text(max_size=20), st.just(0.0) | st.floats(1e-6, 0.5), st.integers(1, 6))
def test_whatever_the_draw_a_candidate_comes_back_with_a_propensity(
    decision_id: str, ratio: float, count: int
) -> None:
    order = [candidate(f"slm{i}", 1.0 - i / 10) for i in range(count)]
    chosen, propensity, explored = explore(order, decision_id, ratio)
    assert chosen in order
    assert 0.0 < propensity <= 1.0
    assert explored == (chosen is not order[0])


def test_exploration_happens_as_often_as_its_propensities_say() -> None:
    order = [candidate("best", 0.9), candidate("second", 0.5), candidate("third", 0.1)]
    draws = [explore(order, f"decision {i}", 0.3) for i in range(4000)]
    share = Counter(chosen.slm_id for chosen, *_ in draws)
    by_id = {chosen.slm_id: propensity for chosen, propensity, _ in draws}
    assert sum(by_id.values()) == pytest.approx(1.0)
    for slm_id, propensity in by_id.items():
        assert share[slm_id] / 4000 == pytest.approx(propensity, abs=0.03)


def explored_from(order: list[Candidate], slo: ServiceLevel = NO_SLO) -> set[str]:
    return {explore(order, f"decision {i}", 0.5, slo)[0].slm_id for i in range(300)}


def test_exploration_costs_little_latency() -> None:
    slow, near = EXPLORED_LATENCY + 0.01, EXPLORED_LATENCY - 0.01
    order = [candidate("best"), candidate("slow", latency=slow), candidate("near", latency=near)]
    assert explored_from(order) == {"best", "near"}


@pytest.mark.parametrize(
    ("slo", "slow"),
    [
        (ServiceLevel(ttft_ms=200.0), {"ttft_s": 0.15}),
        (ServiceLevel(tpot_ms=20.0), {"tpot_s": 0.015}),
        (ServiceLevel(deadline_s=2.0), {"ttft_s": 1.0}),
    ],
)
def test_exploration_stays_inside_the_headroom_of_the_requests_slo(
    slo: ServiceLevel, slow: dict[str, float]
) -> None:
    quick = {"ttft_s": 0.01, "tpot_s": 0.001}
    predictions = [
        make_prediction("best", **quick),
        make_prediction("near", **quick),
        make_prediction("slow", **{**quick, **slow}),
    ]
    weights = weights_of(make_goals(latency_weight_per_s=0.0))
    order = [evaluate(slo, p, make_state(p.slm_id), weights) for p in predictions]
    # It would probably hold the SLO, and costs less than exploration may cost.
    assert order[2].latency < EXPLORED_LATENCY
    assert explored_from(order, slo) == {"best", "near"}
    assert explored_from(order) == {"best", "near", "slow"}


def test_where_the_best_one_misses_the_slo_as_well_exploration_goes_on() -> None:
    slo = ServiceLevel(ttft_ms=1.0)
    weights = weights_of(make_goals())
    order = [evaluate(slo, make_prediction(i), make_state(i), weights) for i in ("best", "as_late")]
    assert explored_from(order, slo) == {"best", "as_late"}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_with_nothing_to_explore_the_best_one_is_certain(ratio: float) -> None:
    only = [candidate("only")]
    assert explore(only, "id", ratio) == (only[0], 1.0, False)
    late = [candidate("best"), candidate("late", latency=1.0)]
    assert explore(late, "id", ratio) == (late[0], 1.0, False)
