"""Feedback that comes mostly for failures does not look like an SLM that broke."""

from __future__ import annotations

from random import Random

import pytest

from calm_serve.learning.quality import SLMQualityStream, feedback_score
from calm_serve.testing import FakeClock
from calm_serve.types import QualitySignal

FAILED = (QualitySignal("validator:sql", 0.0),)


def test_complaints_about_one_answer_in_fifty_change_nothing_until_there_are_more() -> None:
    clock, draw = FakeClock(), Random(1)
    quality = SLMQualityStream(clock)
    factors = []
    for _ in range(5_000):
        quality.answered(())
        if draw.random() < 0.02:
            quality.scored(0.9, 0.0)
        clock.advance(0.5)
        factors.append(quality.factor)
    assert min(factors) > 0.9


def test_feedback_on_most_answers_is_compared_with_the_prediction_at_once() -> None:
    quality = SLMQualityStream(FakeClock())
    for _ in range(15):
        quality.answered(())
        quality.scored(0.9, 0.0)
    assert quality.factor < 0.5


def test_feedback_that_begins_late_counts_within_tens_of_answers() -> None:
    quality = SLMQualityStream(FakeClock())
    for _ in range(400):
        quality.answered(())
    for _ in range(25):
        quality.answered(())
        quality.scored(0.9, 0.0)
    assert quality.factor < 0.5


def test_failures_reported_alone_do_not_lower_the_factor_much() -> None:
    clock, draw = FakeClock(), Random(2)
    quality = SLMQualityStream(clock)
    factors = []
    for _ in range(3_000):
        quality.answered(FAILED if draw.random() < 0.1 else ())
        clock.advance(1.0)
        factors.append(quality.factor)
    assert sum(f < 0.85 for f in factors) < 0.02 * len(factors)
    assert max(factors) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_failures_far_above_the_usual_lower_the_factor_within_50_answers(seed: int) -> None:
    clock, draw = FakeClock(), Random(seed)
    quality = SLMQualityStream(clock)
    for number in range(550):
        failing = 0.9 if number >= 500 else 0.1
        quality.answered(FAILED if draw.random() < failing else ())
        clock.advance(0.2)
    assert quality.factor < 0.5


def test_an_slm_that_never_failed_its_validator_loses_its_factor_once_it_does() -> None:
    clock = FakeClock()
    quality = SLMQualityStream(clock, form_is_checked=True)
    for number in range(310):
        quality.answered(FAILED if number >= 300 else ())
        clock.advance(0.2)
    assert quality.factor < 0.5


@pytest.mark.parametrize("seed", range(10))
def test_feedback_on_some_answers_finds_a_broken_slm_within_50_of_them(seed: int) -> None:
    clock, draw = FakeClock(), Random(seed)
    quality = SLMQualityStream(clock)

    def answer(usual: float) -> None:
        quality.answered(())
        ruled, score = draw.random() < 0.5, float(draw.random() < usual)
        if draw.random() < 0.3:
            quality.scored(None if ruled else 0.6, score)
        clock.advance(1.0)

    for _ in range(400):
        answer(0.75)
    assert quality.factor > 0.8
    for _ in range(50):
        answer(0.0)
    assert quality.factor < 0.5  # below it no rule names the SLM


def test_the_factor_of_an_slm_named_by_rules_survives_another_predictor() -> None:
    clock = FakeClock()
    quality = SLMQualityStream(clock)
    for number in range(120):
        if number == 80:
            quality.forget_predictor()
        quality.answered(())
        quality.scored(None, float(number < 40))
        clock.advance(0.2)
    assert quality.factor < 0.3


def test_a_lasting_change_becomes_the_usual_score() -> None:
    clock, draw = FakeClock(), Random(3)
    quality = SLMQualityStream(clock)
    for number in range(30_000):
        quality.scored(None, float(draw.random() < (0.9 if number < 500 else 0.5)))
        clock.advance(0.2)
    assert quality.factor > 0.85


def test_another_predictor_starts_with_a_factor_of_one() -> None:
    quality = SLMQualityStream(FakeClock())
    for _ in range(20):
        quality.answered(())
        quality.scored(0.9, 0.0)
    quality.forget_predictor()
    assert quality.factor == 1.0


def test_the_latest_feedback_counts_and_other_sources_do_not() -> None:
    scores = (QualitySignal("feedback", 1.0, 2.0), QualitySignal("feedback", 0.25, 3.0))
    assert feedback_score((*scores, *FAILED)) == 0.25
    assert feedback_score(FAILED) is None
