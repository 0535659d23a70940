"""Detectors fire on a change, soon, and hardly ever without one."""

from __future__ import annotations

from random import Random

import pytest

from calm_serve.telemetry.change_detection import (
    PSI_ALARM,
    PSI_CLEAR,
    Cusum,
    LevelChange,
    PopulationShift,
)


def test_a_cumulative_sum_counts_the_values_since_a_change_began() -> None:
    cusum = Cusum(slack=0.5, limit=4.0)
    assert not any(cusum.add(deviation) for deviation in (0.0, 0.4, -1.0, 0.3))
    assert [cusum.add(1.5) for _ in range(5)] == [False] * 4 + [True]
    assert cusum.run == 5


def first_change(test: LevelChange, values: list[float]) -> tuple[int, float] | None:
    for number, value in enumerate(values):
        if (change := test.add(value)) is not None:
            return number, change
    return None


@pytest.mark.parametrize("factor", [0.7, -0.7])
def test_a_level_that_doubles_or_halves_is_found_within_25_values(factor: float) -> None:
    draw, test = Random(1), LevelChange(slack=0.15, limit=6.0)
    assert first_change(test, [draw.gauss(0.3, 0.2) for _ in range(400)]) is None
    found = first_change(test, [draw.gauss(0.3 + factor, 0.2) for _ in range(60)])
    assert found is not None
    assert found[0] <= 25
    assert found[1] == pytest.approx(factor, abs=0.25)


def test_noise_around_a_level_is_hardly_ever_a_change() -> None:
    draw, test = Random(2), LevelChange(slack=0.15, limit=6.0)
    values = [draw.gauss(-0.5, 0.3) for _ in range(20_000)]
    assert sum(test.add(v) is not None for v in values) <= 2


def test_after_a_change_the_new_level_is_the_normal_one() -> None:
    draw, test = Random(3), LevelChange(slack=0.15, limit=6.0)
    values = [draw.gauss(0.0, 0.2) for _ in range(200)]
    values += [draw.gauss(1.0, 0.2) for _ in range(2_000)]
    assert sum(test.add(v) is not None for v in values) == 1


def prompts(draw: Random, weights: list[float], count: int) -> list[list[int]]:
    bins = range(len(weights))
    return [sorted(set(draw.choices(bins, weights, k=8))) for _ in range(count)]


def test_the_same_mix_of_prompts_is_no_shift() -> None:
    draw, shift = Random(4), PopulationShift(32)
    weights = [1.0 + (i % 5) for i in range(32)]
    highest = 0.0
    for hits in prompts(draw, weights, 5_000):
        shift.add(hits)
        highest = max(highest, shift.index() if shift.requests % 50 == 0 else 0.0)
    assert highest < PSI_CLEAR


def test_another_mix_of_prompts_is_found_and_becomes_the_usual_one_in_time() -> None:
    draw, shift = Random(5), PopulationShift(32)
    before = [5.0] * 16 + [1.0] * 16
    for hits in prompts(draw, before, 3_000):
        shift.add(hits)
    asked = 0
    while shift.index() < PSI_ALARM and asked < 1_000:
        shift.add(*prompts(draw, before[::-1], 1))
        asked += 1
    assert asked < 300
    for hits in prompts(draw, before[::-1], 20_000):
        shift.add(hits)
    assert shift.index() < PSI_CLEAR


def test_a_shift_is_not_claimed_before_there_is_a_usual_mix() -> None:
    shift = PopulationShift(4)
    for number in range(300):
        shift.add([number % 2])
    assert shift.index() == 0.0
