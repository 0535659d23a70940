"""The live half of the paper's experiment: arrivals, blocks, pairs and intervals."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from load_tests.common import arrivals
from load_tests.paper.figures import (
    GENERALIST,
    OURS,
    PAPER,
    POLICIES,
    Record,
    Table,
    comparisons,
    per_policy,
    residency,
)
from load_tests.paper.live import sequence
from load_tests.paper.runs import blocks_of, quality_of, shares_of


def record(policy: str, place: int, **fields: object) -> Record:
    values = {"latency_s": 1.0, "energy_j": 1.0, "slm": "general", **fields}
    return Record("hot", policy, place, place, float(place), **values)  # type: ignore[arg-type]


def test_a_day_has_the_mean_rate_and_the_shape_that_is_stated() -> None:
    at_s = arrivals.day(20_000, 10.0, Random(1))
    assert at_s == sorted(at_s)
    assert 0.0 <= at_s[0] < at_s[-1] <= 2000.0
    hours = Counter(int(t / 2000.0 * 24.0) for t in at_s)
    for hour in (3, 11, 17, 20):
        minutes = [arrivals.world_cup(hour + m / 60.0) for m in range(60)]
        expected = 20_000 / 24.0 * sum(minutes) / 60.0
        assert hours[hour] == pytest.approx(expected, abs=4.0 * expected**0.5)


def test_a_day_peaks_with_the_last_match_and_is_low_at_night() -> None:
    shape = [arrivals.world_cup(m / 60.0) for m in range(24 * 60)]
    assert sum(shape) / len(shape) == pytest.approx(1.0)
    assert shape.index(max(shape)) == pytest.approx(21 * 60, abs=10)
    assert max(shape) == pytest.approx(2.5, abs=0.05)
    assert min(shape) == pytest.approx(arrivals.world_cup(2.0), abs=0.1)


def test_blocks_are_of_equal_time_and_lose_nothing() -> None:
    order = sequence([0.5, 1.0, 1.5, 6.0, 9.0, 12.0], 4, Random(1))
    blocks = blocks_of(order, 4)
    assert [[a.place for a in block] for block in blocks] == [[0, 1, 2], [3], [4, 5]]


def test_every_request_is_sent_once_before_any_is_sent_again() -> None:
    order = sequence([float(i) for i in range(10)], 4, Random(1))
    assert sorted(a.request for a in order[:4]) == [0, 1, 2, 3]
    assert [a.request for a in order[4:8]] == [a.request for a in order[:4]]


def test_shares_are_those_that_ours_had_so_far() -> None:
    found = [record(OURS, i, slm="sql" if i else "general") for i in range(4)]
    found.append(record(GENERALIST, 9))
    found.append(record(OURS, 5, slm="", error="status 503"))
    assert shares_of(found, "hot") == {"sql": 0.75, "general": 0.25}
    assert shares_of(found, "azure") == {}


def test_quality_as_a_target_is_what_the_other_policy_had_in_all_scenarios() -> None:
    found = [record(PAPER, i, credit=0.5 * (i % 2)) for i in range(4)]
    found += [record(OURS, 5, credit=1.0)]
    assert quality_of(found, PAPER) == 0.25
    with pytest.raises(ValueError, match="generalist has no answers yet"):
        quality_of(found, GENERALIST)


def test_figures_of_ours_over_the_others() -> None:
    found = []
    for place in range(50):
        found.append(record(OURS, place, latency_s=0.2, energy_j=0.5, exact=float(place % 2)))
        found.append(record(GENERALIST, place, exact=float(place % 4 == 0), energy_j=2.0))
        found.append(record(PAPER, place, latency_s=0.4 - 0.001 * place))
    figures = comparisons(Table(found, POLICIES))
    assert figures["latency_reduction"] == pytest.approx(0.8)
    assert figures["latency_reduction_ci95"] == pytest.approx([0.8, 0.8])
    assert figures["energy_reduction"] == pytest.approx(0.75)
    assert figures["quality_difference"] == pytest.approx(0.24)
    low, high = figures["quality_difference_ci95"]
    assert low < 0.24 < high
    low, high = figures["paper_policy_latency_reduction_ci95"]
    assert low < figures["paper_policy_latency_reduction"] < high
    assert not any(name.startswith("share_matched") for name in figures)


def test_a_request_without_an_answer_is_wrong_and_has_no_latency() -> None:
    nothing = {"latency_s": float("nan"), "energy_j": float("nan"), "error": "status 429"}
    found = [record(OURS, i, exact=1.0) for i in range(4)]
    found += [record(GENERALIST, i, latency_s=2.0, exact=1.0) for i in range(3)]
    found.append(record(GENERALIST, 3, slm="", **nothing))
    table = Table(found, POLICIES)
    figures = comparisons(table) | per_policy(table, "hot")
    assert figures["latency_reduction"] == pytest.approx(0.5)
    assert figures["quality_difference"] == pytest.approx(0.25)
    assert figures["hot.generalist.errors"] == 1
    assert figures["hot.generalist.share.general"] == 0.75


def test_hits_are_counted_over_what_the_offline_optimum_has() -> None:
    trace = ["sql", "sql", "shell", "sql", "general", "sql"]
    hot = [True, False, True, True, False, True]
    found = [
        record(OURS, i, preferred=slm, preferred_hot=is_hot)
        for i, (slm, is_hot) in enumerate(zip(trace, hot, strict=True))
    ]
    found += [record(PAPER, i) for i in range(6)]
    figures = residency(Table(found, POLICIES), slots=2)
    assert figures["residency_hit_rate"] == pytest.approx(4 / 6, abs=1e-4)
    assert figures["residency_hit_rate_belady"] == pytest.approx(5 / 6, abs=1e-4)
    assert figures["residency_hit_ratio_belady"] == pytest.approx(0.8)
    assert not any(name.startswith("paper_policy") for name in figures)


def test_places_that_a_policy_never_reached_are_left_out() -> None:
    found = [record(OURS, i) for i in range(4)] + [record(PAPER, i) for i in range(3)]
    assert len(Table(found, POLICIES)) == 3
