"""How served changes are counted: from the change on, in requests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from load_tests.common.workloads import standard
from load_tests.paper.changes import figures as figures_of
from load_tests.paper.figures import OURS, Record
from load_tests.paper.traffic import drawn


def sent(slms: Sequence[str]) -> list[Record]:
    return [Record("", OURS, i, i, float(i), 0.1, slm) for i, slm in enumerate(slms)]


def took(joules: Sequence[float]) -> list[Record]:
    return [Record("", OURS, i, i, float(i), 0.1, "a", energy_j=j) for i, j in enumerate(joules)]


def test_a_goal_is_recovered_where_the_next_requests_hold_it() -> None:
    after = took([2.0] * 30 + [1.0] * 270)
    found = figures_of.goal("energy_j", 1.0, after, took([2.0] * 60))
    # 54 of 60 at 1 J and 6 at 2 J are 1.1 J on the mean.
    assert found["recovery_requests"] == 24
    assert found["over_goal_ratio"] == 1.0
    assert found["without_ratio"] == 2.0
    assert found["held_ratio"] == pytest.approx(217 / 241)
    assert found["worst_ratio"] == 1.5


def test_a_goal_that_is_lost_again_has_not_settled() -> None:
    after = took([1.0] * 100 + [2.0] * 20 + [1.0] * 180)
    found = figures_of.goal("energy_j", 1.0, after, took([2.0] * 60))
    assert found["recovery_requests"] == 0
    # From place 114 on, 6 of 60 are left at 2 J.
    assert found["settled_requests"] == 114


def test_a_goal_that_is_never_held_counts_every_request() -> None:
    found = figures_of.goal("energy_j", 0.5, took([1.0] * 300), took([1.0] * 60))
    assert found["recovery_requests"] == 300
    assert found["held_ratio"] == 0.0


def test_an_unanswered_request_is_late() -> None:
    answered = sent(["a"] * 90)
    silent = [Record("", OURS, i, i, float(i)) for i in range(10)]
    assert figures_of.measured(answered, "latency_s") == pytest.approx(0.1)
    assert figures_of.measured(answered + silent, "latency_s") == float("inf")


def test_a_broken_slm_is_drained_when_a_hundred_requests_go_elsewhere() -> None:
    before = sent(["a", "b"] * 100)
    during = sent(["a", "b"] * 15 + ["b"] * 200)
    found = figures_of.drain(before, during, "a")
    # Of the hundred from place 10 on, 10 are its own: a fifth of its usual half.
    assert (found["lost"], found["drain_requests"]) == (True, 15)
    kept = figures_of.drain(before, sent(["a", "b"] * 100), "a")
    assert (kept["lost"], kept["drain_requests"]) == (False, 100)


def test_a_cold_start_slm_is_adopted_at_four_fifths_of_the_share_of_a_known_one() -> None:
    known = sent(["a", "b"] * 150)
    after = sent(["b"] * 50 + ["a", "b"] * 125)
    found = figures_of.adoption(known, after, "a")
    assert found["adoption_requests"] == 29
    assert found["first_share_ratio"] == 0.5
    assert found["last_share_ratio"] == 1.0


def test_no_request_comes_twice_before_all_came_once() -> None:
    workload = standard()
    whole = drawn(workload, (), len(workload), 1)
    assert sorted(whole) == list(range(len(workload)))
    some = drawn(workload, ("sql",), 300, 1)
    assert {workload[i].row.task for i in some} == {"sql"}
    assert len(some) == 300
