"""Forecast of arrivals: counts without structure, transitions where there is one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice
from random import Random

import pytest

from calm_serve.residency.forecast import MAX_SLMS, RATE_HALF_LIFE_S, Forecast

IDS = ("a", "b", "c")


def trained(arrivals: Iterable[str], period_s: float = 1.0, ids: tuple[str, ...] = IDS) -> Forecast:
    forecast = Forecast()
    forecast.set_slms(ids)
    for number, slm_id in enumerate(arrivals):
        forecast.observe(slm_id, number * period_s)
    return forecast


def test_nothing_is_expected_before_the_first_arrival() -> None:
    assert trained(()).expected(4.0) == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert trained(()).rate_per_s(100.0) == 0.0


def test_expected_arrivals_add_up() -> None:
    assert sum(trained("abacab").expected(7.0).values()) == pytest.approx(7.0)


def test_shares_follow_the_counts_of_independent_arrivals() -> None:
    draws = Random(3).choices(IDS, (0.6, 0.3, 0.1), k=2000)
    expected = trained(draws).expected(100.0)
    assert [expected[i] for i in IDS] == pytest.approx([60, 30, 10], abs=12)


def test_turns_are_learned() -> None:
    forecast = trained(islice(cycle("abc"), 60))  # c was the last one
    expected = forecast.expected(1.0)
    assert expected["a"] > 0.9


def test_after_a_change_the_new_favourite_is_expected_within_a_few_arrivals() -> None:
    forecast = trained("a" * 500 + "b" * 8)
    expected = forecast.expected(1.0)
    assert expected["b"] > 0.6


def test_the_rate_is_that_of_the_arrivals_and_fades() -> None:
    forecast = trained("ab" * 100, period_s=0.1)
    last = 199 * 0.1
    assert forecast.rate_per_s(last) == pytest.approx(10.0, rel=0.1)
    assert forecast.rate_per_s(last + 10 * RATE_HALF_LIFE_S) < 0.1


def test_slms_that_stay_keep_what_is_known_when_others_come_and_go() -> None:
    forecast = trained("aaab" * 20)
    forecast.set_slms(("new", "a"))
    assert set(forecast.expected(1.0)) == {"new", "a"}
    assert forecast.expected(1.0)["a"] > 0.9


def test_unknown_slms_are_ignored_and_the_size_is_bounded() -> None:
    forecast = trained(("unknown",))
    assert forecast.expected(1.0)["a"] == 0.0
    forecast.set_slms(tuple(f"slm-{n}" for n in range(MAX_SLMS + 5)))
    assert len(forecast.expected(1.0)) == MAX_SLMS
