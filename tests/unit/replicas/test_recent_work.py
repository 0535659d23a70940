"""How evenly recent work is spread."""

from __future__ import annotations

import pytest

from calm_serve.replicas.recent_work import HALF_LIFE, RecentWork


def test_excess_is_the_share_above_the_mean() -> None:
    work = RecentWork()
    work.retain(["a", "b"])
    work.add("a", 300.0)
    work.add("b", 100.0)
    assert work.excess(["a", "b"], 0.0) == pytest.approx([0.5, -0.5], rel=0.03)
    assert work.excess(["b", "a"], 200.0) == pytest.approx([-0.25, 0.25], rel=0.03)


def test_without_any_work_all_replicas_are_even() -> None:
    assert RecentWork().excess(["a", "b"], 1.0) == [0.0, 0.0]
    assert RecentWork().excess([], 1.0) == []


def test_old_work_fades_with_later_requests() -> None:
    work = RecentWork()
    work.retain(["a", "b"])
    work.add("a", 1000.0)
    for _ in range(int(2 * HALF_LIFE)):
        work.add("b", 0.0)
    # Half of it is left: `HALF_LIFE` requests for each of two replicas.
    assert work.excess(["a", "b"], 250.0)[0] == pytest.approx(250.0 / (250.0 + 250.0), rel=0.01)


def test_a_correction_is_no_request() -> None:
    work = RecentWork()
    work.add("a", 100.0)
    for _ in range(100):
        work.add("a", 1.0, 0)
        work.add("a", -1.0, 0)
    assert work.excess(["a", "b"], 50.0) == pytest.approx([0.5, -0.5])


def test_a_new_replica_starts_with_the_mean_and_a_lost_one_is_forgotten() -> None:
    work = RecentWork()
    work.retain(["a", "b"])
    work.add("a", 300.0)
    work.add("b", 100.0)
    work.retain(["a", "b", "c"])
    assert work.excess(["a", "b", "c"], 0.0)[2] == pytest.approx(0.0, abs=0.01)
    work.retain(["c"])
    assert set(work._work) == {"c"}


def test_numbers_stay_finite_after_any_number_of_requests() -> None:
    work = RecentWork()
    for _ in range(50_000):
        work.add("a", 100.0)
    assert work.excess(["a", "b"], 0.0) == pytest.approx([1.0, -1.0])
