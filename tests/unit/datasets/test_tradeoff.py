"""RouteLLM's measures of order between two models, and curves over a price."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calm_serve.datasets.tradeoff import (
    deferral_curve,
    price_curve,
    recovered,
    recovered_figures,
    stronger_gain,
)

RANDOM = np.random.default_rng(5)


def two_models(count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    return (RANDOM.random(count) < 0.4).astype(float), (RANDOM.random(count) < 0.8).astype(float)


def test_a_random_router_recovers_half_of_the_gap() -> None:
    weak, strong = two_models()
    areas = [
        recovered(deferral_curve(RANDOM.random(3000), weak, strong), weak.mean(), strong.mean())
        for _ in range(20)
    ]
    assert np.mean([a.apgr for a in areas]) == pytest.approx(0.5, abs=0.01)
    assert np.mean([a.cpt50 for a in areas]) == pytest.approx(50.0, abs=1.5)
    assert np.mean([a.cpt80 for a in areas]) == pytest.approx(80.0, abs=1.5)


def test_a_constant_score_is_no_router() -> None:
    weak, strong = np.sort(RANDOM.random((2, 4000)), axis=1) * [[0.5], [1.0]]
    found = recovered(deferral_curve(np.ones(4000), weak, strong), weak.mean(), strong.mean())
    assert found.apgr == pytest.approx(0.5, abs=0.02)


def test_knowing_the_gain_recovers_more_than_knowing_its_opposite() -> None:
    weak, strong = two_models()
    best = recovered(deferral_curve(strong - weak, weak, strong), weak.mean(), strong.mean())
    worst = recovered(deferral_curve(weak - strong, weak, strong), weak.mean(), strong.mean())
    assert best.apgr > 0.85
    assert worst.apgr < 0.15
    assert best.cpt50 < 25.0 < 75.0 < worst.cpt50


@given(arrays(float, st.integers(12, 200), elements=st.floats(-1, 1)))
def test_a_curve_goes_from_the_weaker_model_alone_to_the_stronger_alone(gain: np.ndarray) -> None:
    weak, strong = np.linspace(0, 0.5, len(gain)), np.linspace(1, 0.2, len(gain))
    curve = deferral_curve(gain, weak, strong)
    assert len(curve.cost) == 11
    assert (curve.cost[0], curve.cost[-1]) == (0.0, pytest.approx(100.0))
    assert np.all(np.diff(curve.cost) >= 0.0)
    assert curve.score[0] == pytest.approx(weak.mean())
    assert curve.score[-1] == pytest.approx(strong.mean())


def test_thresholds_are_the_deciles_of_the_gain() -> None:
    gain = RANDOM.random(137)
    weak, strong = np.zeros(137), RANDOM.random(137)
    expected = [strong[gain >= edge].sum() / 137 for edge in np.quantile(gain, np.arange(10) / 10)]
    curve = deferral_curve(gain, weak, strong)
    assert curve.score.tolist() == pytest.approx([0.0, *expected[::-1]])


def test_figures_have_intervals_around_them_and_are_none_without_a_gap() -> None:
    weak, strong = two_models(800)
    scores = np.stack([strong, weak], axis=1)
    figures = recovered_figures(stronger_gain(scores, scores), scores)
    low, high = figures["apgr_ci95"]
    assert low < figures["apgr"] < high
    assert set(recovered_figures(weak, np.stack([weak, weak], axis=1)).values()) == {None}
    assert set(recovered_figures(weak, np.stack([weak, strong, weak], axis=1)).values()) == {None}


def test_a_price_curve_runs_from_the_cheapest_model_to_the_best_prediction() -> None:
    scores = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    costs = np.tile([1.0, 10.0], (4, 1))
    curve = price_curve(scores * 0.9, scores, costs, np.array([1.0, 10.0]))
    assert (curve.cost[0], curve.score[0]) == (1.0, 0.5)
    # Where both are right the cheaper one is chosen, at the first price that is not zero.
    assert (5.5, 1.0) in zip(curve.cost.tolist(), curve.score.tolist(), strict=True)
