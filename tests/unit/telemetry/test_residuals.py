"""Measured over predicted, by SLM and load: level, slope, spread and change."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.telemetry.residuals import (
    CHANGE_LIMIT,
    MAX_LOG_RATIO,
    PRIOR_SPREAD,
    STEP_SHARE,
    TIME_HALF_LIFE,
    LoadLine,
    ResidualEstimator,
    SLMResiduals,
    TokenEnergy,
    TotalRatio,
)
from calm_serve.testing import make_outcome, make_prediction
from calm_serve.types import LoadAtDecision, PredictorVersion, Versions

STEP_J, TOKEN_J = 0.05, 0.004


def answered(running: float = 1.0, in_flight: int = 1, applied: float = 1.0, **fields: Any) -> Any:
    """An answer whose decision expected a TTFT of 50 ms and 0.68 s in all."""
    return make_outcome(load=LoadAtDecision(running, in_flight, applied), **fields)


def test_joules_of_a_step_are_separated_from_joules_of_a_token() -> None:
    energy, random = TokenEnergy(), Random(1)
    for _ in range(200):
        running, tokens = random.randint(1, 8), random.randint(5, 60)
        noise = random.uniform(0.5, 1.5)
        energy.add(noise * (TOKEN_J + STEP_J / running), running, tokens)
    for others in (0, 1, 3, 7):
        expected = TOKEN_J + STEP_J / (others + 1)
        assert energy.next_j(others) == pytest.approx(expected, rel=0.25)


def test_a_busy_engine_is_cheaper_to_join_even_where_load_never_varied() -> None:
    energy = TokenEnergy()
    for _ in range(50):
        energy.add(0.1, 1, 30)
    assert energy.next_j(0) == pytest.approx(0.1)
    assert energy.next_j(3) == pytest.approx(0.1 * (1 - STEP_SHARE + STEP_SHARE / 4))


def test_joules_before_the_first_answer_are_unknown() -> None:
    assert TokenEnergy().next_j(0) is None


@given(
    st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(1, 64), st.integers(1, 500)), min_size=1),
    st.integers(0, 64),
)
def test_joules_are_never_negative_and_fall_with_company(
    answers: list[tuple[float, int, int]], others: int
) -> None:
    energy = TokenEnergy()
    for joules, running, tokens in answers:
        energy.add(joules, running, tokens)
    alone, joined = energy.next_j(0), energy.next_j(others)
    assert alone is not None
    assert joined is not None
    assert -1e-9 <= joined <= alone + 1e-9


def test_the_ttft_ratio_follows_the_load_in_both_directions() -> None:
    ratio, random = ResidualEstimator(), Random(2)
    for i in range(60):
        in_flight = 1 if i % 2 else 6
        ratio.add(in_flight**0.8 * math.exp(random.gauss(0.0, 0.1)), in_flight)
    assert ratio.at(0.0) == pytest.approx(1.0, rel=0.2)
    assert ratio.at(math.log(6)) == pytest.approx(6**0.8, rel=0.2)


def test_the_ttft_ratio_follows_a_change_that_load_does_not_explain() -> None:
    ratio = ResidualEstimator()
    for _ in range(40):
        ratio.add(1.0, 2)
    for _ in range(20):
        ratio.add(3.0, 2)
    assert 2.0 < ratio.at(math.log(2)) < 3.2


def test_a_single_answer_moves_the_ttft_ratio_a_part_of_the_way() -> None:
    ratio = ResidualEstimator()
    assert ratio.at(math.log(10)) == 1.0
    ratio.add(8.0, 1)
    assert 1.0 < ratio.at(0.0) < 4.0


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(1, 500)), min_size=1))
def test_the_ttft_ratio_is_bounded(answers: list[tuple[float, int]]) -> None:
    ratio = ResidualEstimator()
    for measured, in_flight in answers:
        ratio.add(measured, in_flight)
    for in_flight in (1, 1000):
        assert math.exp(-MAX_LOG_RATIO) <= ratio.at(math.log(in_flight)) <= math.exp(MAX_LOG_RATIO)


@pytest.mark.parametrize("ratio", [1e9, math.inf])
def test_an_accident_counts_as_a_factor_of_20(ratio: float) -> None:
    accident, slow = ResidualEstimator(), ResidualEstimator()
    accident.add(ratio)
    slow.add(math.exp(MAX_LOG_RATIO))
    assert (accident.at(), accident.spread) == (slow.at(), slow.spread)


def test_a_latency_is_that_of_the_load_that_is_asked_for() -> None:
    tpot, random = LoadLine(), Random(4)
    assert (tpot.answers, tpot.trust) == (0, 0.0)
    for i in range(60):
        in_flight = 1 + i % 8
        tpot.add(0.01 * in_flight**0.6 * math.exp(random.gauss(0.0, 0.1)), in_flight)
    assert math.exp(tpot.log_at()) == pytest.approx(0.01, rel=0.2)
    assert math.exp(tpot.log_at(math.log(8))) == pytest.approx(0.01 * 8**0.6, rel=0.2)


def test_a_correction_that_was_applied_is_not_learned_again() -> None:
    residuals = SLMResiduals()
    for _ in range(100):
        applied = residuals.ttft.at(0.0)
        predicted = make_prediction(ttft_s=0.05 * applied)
        residuals.observe(answered(applied=applied, ttft_s=0.15, predicted=predicted))
    assert residuals.ttft.at(0.0) == pytest.approx(3.0, rel=0.2)
    assert residuals.ttft.spread < PRIOR_SPREAD  # the last predictions were right


def test_answers_that_say_nothing_of_load_are_left_out() -> None:
    residuals = SLMResiduals()
    residuals.observe(make_outcome())
    residuals.observe(answered(cold=True))
    residuals.observe(answered(status="error"))
    assert residuals.energy.next_j(0) is None
    assert residuals.ttft.at(0.0) == 1.0


def test_an_answer_to_a_rules_decision_tells_joules_only() -> None:
    residuals = SLMResiduals()
    residuals.observe(answered(predicted=None, energy_j=1.0, output_tokens=10))
    assert residuals.energy.next_j(0) == pytest.approx(0.1)
    assert residuals.ttft.at(0.0) == 1.0


def test_spread_becomes_that_of_the_ratios() -> None:
    residual, random = ResidualEstimator(), Random(3)
    assert residual.spread == PRIOR_SPREAD
    for _ in range(300):
        residual.add(math.exp(random.gauss(0.0, 0.2)))
    assert residual.spread == pytest.approx(0.2, rel=0.3)


def test_half_of_the_level_is_from_the_answers_of_one_half_life() -> None:
    residual = ResidualEstimator()
    for _ in range(1000):
        residual.add(1.0)
    for _ in range(int(TIME_HALF_LIFE)):
        residual.add(math.e)
    assert residual.log_at() == pytest.approx(0.5, abs=0.01)


def test_a_change_of_the_ratio_is_found_and_noise_is_not() -> None:
    residual, random = ResidualEstimator(CHANGE_LIMIT), Random(5)
    noise = [residual.add(math.exp(random.gauss(0.3, 0.3))) for _ in range(2000)]
    assert set(noise) == {None}
    changed = [residual.add(2.0 * math.exp(random.gauss(0.3, 0.3))) for _ in range(30)]
    found = next(change for change in changed if change is not None)
    assert 0.3 < found < 0.8  # log(2), while the mean is following already


def test_without_a_limit_no_change_is_looked_for() -> None:
    residual = ResidualEstimator()
    assert {residual.add(ratio) for ratio in [1.0] * 200 + [9.0] * 200} == {None}


def test_the_total_ratio_is_that_of_the_sums() -> None:
    total = TotalRatio()
    assert (total.log_at(), total.trust) == (0.0, 0.0)
    for _ in range(200):
        total.add(measured=1.0, predicted=2.0)
        total.add(measured=90.0, predicted=45.0)
    assert math.exp(total.log_at()) == pytest.approx(91.0 / 47.0, rel=0.03)


def decided_by(champion: str, cold_start: str = "", *, shipped: bool = False) -> Any:
    version = PredictorVersion(champion, cold_start, shipped)
    return answered(ttft_s=0.2, versions=Versions(version, "g", "f"))  # four times the prediction


def test_answers_of_the_last_predictor_do_not_touch_the_ratio_of_the_present_one() -> None:
    residuals = SLMResiduals("A")
    for _ in range(50):
        residuals.observe(decided_by("A"))
    learned = residuals.ttft.at()
    assert learned == pytest.approx(3.79, abs=0.01)
    residuals.set_champion("B")
    assert residuals.ttft.at() == 1.0
    for i in range(60):  # streams decided by A end among B's answers
        residuals.observe(decided_by("AB"[i % 2]))
    assert residuals.ttft.at() == pytest.approx(4 ** (30 / 32))
    residuals.set_champion("A")  # rolled back
    residuals.observe(decided_by("B"))
    assert residuals.ttft.at() == 1.0
    residuals.observe(decided_by("A"))
    assert residuals.ttft.at() > 1.0


def test_boosters_of_cold_start_slms_and_the_predictors_source_keep_the_ratio() -> None:
    residuals = SLMResiduals("A")
    for i in range(50):
        residuals.set_champion("A")  # published again with every refit
        residuals.observe(decided_by("A", f"new-{i}", shipped=i % 2 == 0))
    assert residuals.ttft.at() == pytest.approx(3.79, abs=0.01)


def test_without_a_champion_every_predictors_answers_count() -> None:
    residuals = SLMResiduals()
    for i in range(110):
        residuals.observe(decided_by("AB"[i % 2]))
    assert residuals.ttft.at() > 3.79
