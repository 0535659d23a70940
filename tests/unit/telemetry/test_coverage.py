"""The calibrated p95 holds for 95 of 100 outcomes, also after the world changed."""

from __future__ import annotations

from random import Random

import pytest

from calm_serve.telemetry.coverage import (
    Calibration,
    RatioQuantiles,
    quantiles,
    ratios,
)
from calm_serve.testing import make_outcome, make_prediction


def test_nothing_is_said_before_there_are_enough_ratios() -> None:
    quantiles_ = RatioQuantiles()
    for _ in range(19):
        quantiles_.observe(1.0)
    assert (quantiles_.p50, quantiles_.p95, quantiles_.coverage_ratio) == (None, None, None)


@pytest.mark.parametrize("seed", range(5))
def test_the_p95_covers_95_of_100_outcomes_of_a_skewed_distribution(seed: int) -> None:
    draw, found = Random(seed), RatioQuantiles()
    missed = 0
    for _ in range(4_000):
        ratio = draw.lognormvariate(0.2, 0.6)
        missed += found.p95 is not None and ratio > found.p95
        found.observe(ratio)
    assert missed / 4_000 == pytest.approx(0.05, abs=0.01)
    assert found.coverage_ratio == pytest.approx(0.95, abs=0.035)
    assert found.p50 == pytest.approx(1.22, rel=0.15)


def test_coverage_comes_back_after_outcomes_became_three_times_as_long() -> None:
    draw, found = Random(7), RatioQuantiles()
    for _ in range(1_000):
        found.observe(draw.lognormvariate(0.0, 0.4))
    for _ in range(300):
        found.observe(3.0 * draw.lognormvariate(0.0, 0.4))
    missed = 0
    for _ in range(500):
        ratio = 3.0 * draw.lognormvariate(0.0, 0.4)
        missed += ratio > (found.p95 or 0.0)
        found.observe(ratio)
    assert missed / 500 < 0.08


def test_ratios_are_observed_over_predicted_of_answers_that_were_predicted() -> None:
    outcome = make_outcome(
        predicted=(0.5, 20.0, 0.1, 0.01, 2.0),
        ttft_s=0.2,
        e2e_s=0.58,
        output_tokens=10,
        energy_j=1.0,
    )
    assert dict(ratios(outcome)) == pytest.approx(
        {"ttft_s": 2.0, "e2e_s": 2.0, "output_tokens": 0.5, "energy_j": 0.5}
    )


@pytest.mark.parametrize("fields", [{"predicted": ()}, {"status": "error"}, {"cold": True}])
def test_what_was_not_predicted_or_not_answered_has_no_ratio(fields: dict[str, object]) -> None:
    assert not list(ratios(make_outcome(**fields)))


def test_a_prediction_gets_quantiles_in_its_own_units() -> None:
    calibration = Calibration()
    for number in range(100):
        ratio = 1.0 + number / 100
        calibration.observe(
            make_outcome(predicted=(0.5, 10.0, 0.05, 0.01, 1.0), ttft_s=0.05 * ratio)
        )
    prediction = make_prediction(ttft_s=0.2)
    fields = {name: getattr(prediction, name) for name in prediction.__slots__}
    found = quantiles(fields, calibration.summary())
    assert found["ttft_s"]["p50"] == pytest.approx(0.3, rel=0.05)
    assert found["ttft_s"]["p95"] == pytest.approx(0.4, rel=0.05)
