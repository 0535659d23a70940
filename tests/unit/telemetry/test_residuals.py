"""What load does to joules per token and to TTFT, learned from answers."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.telemetry.residuals import (
    MAX_LOG_RATIO,
    PRIOR_SPREAD,
    STEP_SHARE,
    LoadedLatency,
    LoadEffect,
    LogSpread,
    TokenEnergy,
    TtftRatio,
)
from calm_serve.testing import make_outcome
from calm_serve.types import LoadAtDecision, Prediction

STEP_J, TOKEN_J = 0.05, 0.004


def answered(running: float = 1.0, in_flight: int = 1, applied: float = 1.0, **fields: Any) -> Any:
    """An answer whose decision expected a TTFT of 50 ms and 0.68 s in all."""
    return make_outcome(load=LoadAtDecision(running, in_flight, applied), **fields)


def test_joules_of_a_step_are_told_from_joules_of_a_token() -> None:
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
    ratio, random = TtftRatio(), Random(2)
    for i in range(60):
        in_flight = 1 if i % 2 else 6
        ratio.add(in_flight**0.8 * math.exp(random.gauss(0.0, 0.1)), in_flight)
    assert ratio.at(0.0) == pytest.approx(1.0, rel=0.2)
    assert ratio.at(math.log(6)) == pytest.approx(6**0.8, rel=0.2)


def test_the_ttft_ratio_follows_a_change_that_load_does_not_explain() -> None:
    ratio = TtftRatio()
    for _ in range(40):
        ratio.add(1.0, 2)
    for _ in range(20):
        ratio.add(3.0, 2)
    assert 2.0 < ratio.at(math.log(2)) < 3.2


def test_a_single_answer_moves_the_ttft_ratio_a_part_of_the_way() -> None:
    ratio = TtftRatio()
    assert ratio.at(math.log(10)) == 1.0
    ratio.add(8.0, 1)
    assert 1.0 < ratio.at(0.0) < 4.0


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(1, 500)), min_size=1))
def test_the_ttft_ratio_is_bounded(answers: list[tuple[float, int]]) -> None:
    ratio = TtftRatio()
    for measured, in_flight in answers:
        ratio.add(measured, in_flight)
    for in_flight in (1, 1000):
        assert math.exp(-MAX_LOG_RATIO) <= ratio.at(math.log(in_flight)) <= math.exp(MAX_LOG_RATIO)


def test_a_latency_is_told_for_the_load_that_is_asked_for() -> None:
    tpot, random = LoadedLatency(), Random(4)
    assert tpot.at(0.0) is None
    for i in range(60):
        in_flight = 1 + i % 8
        tpot.add(0.01 * in_flight**0.6 * math.exp(random.gauss(0.0, 0.1)), in_flight)
    assert tpot.at(0.0) == pytest.approx(0.01, rel=0.2)
    assert tpot.at(math.log(8)) == pytest.approx(0.01 * 8**0.6, rel=0.2)


def test_a_correction_that_was_applied_is_not_learned_again() -> None:
    effect = LoadEffect()
    for _ in range(100):
        applied = effect.ttft.at(0.0)
        predicted = Prediction("small", 0.5, 64.0, 0.05 * applied, 0.01, 6.4)
        effect.observe(answered(applied=applied, ttft_s=0.15, predicted=predicted))
    assert effect.ttft.at(0.0) == pytest.approx(3.0, rel=0.2)
    assert effect.ttft_spread.value < PRIOR_SPREAD  # the last predictions were right


def test_answers_that_say_nothing_of_load_are_left_out() -> None:
    effect = LoadEffect()
    effect.observe(make_outcome())
    effect.observe(answered(cold=True))
    effect.observe(answered(status="error"))
    assert effect.energy.next_j(0) is None
    assert effect.ttft.at(0.0) == 1.0


def test_an_answer_to_a_rules_decision_tells_joules_only() -> None:
    effect = LoadEffect()
    effect.observe(answered(predicted=None, energy_j=1.0, output_tokens=10))
    assert effect.energy.next_j(0) == pytest.approx(0.1)
    assert effect.ttft.at(0.0) == 1.0


def test_spread_becomes_that_of_the_ratios() -> None:
    spread, random = LogSpread(), Random(3)
    assert spread.value == PRIOR_SPREAD
    for _ in range(300):
        spread.add(math.exp(random.gauss(0.0, 0.2)))
    assert spread.value == pytest.approx(0.2, rel=0.3)
