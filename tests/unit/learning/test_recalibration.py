"""P(success) falls with an SLM that breaks, and recovers with it."""

from __future__ import annotations

from random import Random

import pytest

from calm_serve.learning.quality import (
    FACTOR_HALF_LIFE_S,
    MAX_FACTOR,
    MIN_FACTOR,
    Recalibration,
)
from calm_serve.routing import scoring
from calm_serve.testing import FakeClock, make_context, make_goals, make_prediction, make_state

PREDICTED = {"broken": 0.9, "other": 0.6}


class World:
    """Two SLMs with a true P(success) each, a scorer, and a recalibration per SLM."""

    def __init__(self, seed: int) -> None:
        self.clock = FakeClock()
        self.truth = dict(PREDICTED)
        self._draw = Random(seed)
        self._recalibrations = {slm: Recalibration(self.clock) for slm in PREDICTED}
        self._asked = 0

    def choose(self, exploration_ratio: float = 0.0) -> str:
        """Score both SLMs as the selector does; latency and energy are equal."""
        self._asked += 1
        weights = scoring.weights_of(make_goals())
        candidates = [
            scoring.evaluate(
                make_context().slo,
                make_prediction(slm, success_ratio=p),
                make_state(slm, calibration_factor=self._recalibrations[slm].factor()),
                weights,
            )
            for slm, p in PREDICTED.items()
        ]
        order = scoring.ranked(candidates)
        return scoring.explore(order, f"request {self._asked}", exploration_ratio)[0].slm_id

    def ask(self, exploration_ratio: float = 0.0) -> str:
        """One request and its label; a tenth of a second passes."""
        slm = self.choose(exploration_ratio)
        label = float(self._draw.random() < self.truth[slm])
        self._recalibrations[slm].observe(PREDICTED[slm], label)
        self.clock.advance(0.1)
        return slm


@pytest.mark.parametrize("seed", range(20))
def test_an_slm_whose_quality_collapses_loses_its_traffic_within_50_of_its_requests(
    seed: int,
) -> None:
    world = World(seed)
    assert sum(world.ask() == "broken" for _ in range(300)) > 290
    world.truth["broken"] = 0.1
    # An occasional request still tests whether it has recovered.
    assert sum(world.ask() == "broken" for _ in range(400)) <= 50


@pytest.mark.parametrize("seed", range(10))
def test_time_alone_brings_a_recovered_slm_back(seed: int) -> None:
    world = World(seed)
    world.truth["broken"] = 0.1
    while world.choose() == "broken":
        world.ask()
    world.truth["broken"] = 0.9
    world.clock.advance(5 * FACTOR_HALF_LIFE_S)
    assert sum(world.ask() == "broken" for _ in range(100)) > 90


def test_exploration_brings_a_recovered_slm_back_sooner_than_time() -> None:
    world = World(0)
    world.truth["broken"] = 0.1
    while world.choose() == "broken":
        world.ask()
    world.truth["broken"] = 0.9
    asked = 0
    while world.choose() != "broken":
        world.ask(exploration_ratio=0.05)
        asked += 1
    assert asked * 0.1 < FACTOR_HALF_LIFE_S / 2


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8, 0.95])
def test_a_calibrated_predictor_gets_a_factor_near_one(p: float) -> None:
    clock, draw = FakeClock(), Random(1)
    recalibration = Recalibration(clock)
    factors = []
    for _ in range(5_000):
        recalibration.observe(p, float(draw.random() < p))
        clock.advance(1.0)
        factors.append(recalibration.factor())
    assert sum(abs(f - 1.0) for f in factors) / len(factors) < 0.06
    assert sum(abs(f - 1.0) * p > 0.15 for f in factors) / len(factors) < 0.05


@pytest.mark.parametrize(("p", "true"), [(0.5, 0.75), (0.7, 0.7), (0.9, 0.9), (0.8, 0.7)])
def test_a_healthy_slm_does_not_lose_its_traffic_in_ten_thousand_labels(
    p: float, true: float
) -> None:
    clock, draw = FakeClock(), Random(4)
    recalibration = Recalibration(clock)
    below = 0
    for _ in range(10_000):
        recalibration.observe(p, float(draw.random() < true))
        clock.advance(1.0)
        below += recalibration.factor() < 0.5
    assert below <= 50  # a false alarm at most, and over soon


@pytest.mark.parametrize("seed", range(10))
def test_an_slm_that_is_usually_better_than_predicted_is_detected_as_soon(seed: int) -> None:
    clock, draw = FakeClock(), Random(seed)
    recalibration = Recalibration(clock)
    for _ in range(200):
        recalibration.observe(0.55, float(draw.random() < 0.8))
        clock.advance(1.0)
    for _ in range(15):
        recalibration.observe(0.55, 0.0)
    assert recalibration.factor() < 0.5


def test_an_slm_that_is_better_than_predicted_is_raised() -> None:
    recalibration = Recalibration(FakeClock())
    for _ in range(30):
        recalibration.observe(0.4, 1.0)
    assert recalibration.factor() == MAX_FACTOR


def test_a_collapse_is_reported_once_with_its_size() -> None:
    draw, recalibration = Random(2), Recalibration(FakeClock())
    changes = [recalibration.observe(0.9, float(draw.random() < 0.9)) for _ in range(200)]
    assert changes == [None] * 200
    changes = [recalibration.observe(0.9, 0.0) for _ in range(50)]
    (change,) = [c for c in changes if c is not None]
    assert change == pytest.approx(-0.9, abs=0.1)


def test_the_factor_stays_within_its_bounds_and_is_one_without_evidence() -> None:
    recalibration = Recalibration(FakeClock())
    assert recalibration.factor() == 1.0
    for _ in range(500):
        recalibration.observe(0.99, 0.0)
    assert MIN_FACTOR <= recalibration.factor() < 0.1
