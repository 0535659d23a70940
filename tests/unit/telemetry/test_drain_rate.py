"""How fast slots get free: from slots held and answers seen, without a time of full load."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.telemetry.drain_rate import (
    JITTER_RATIO,
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    DrainRate,
)


def busy(slots: int, hold_s: float, seconds: float, prior_hold_s: float = 1.0) -> DrainRate:
    """All slots of a service are held; each answer takes `hold_s`, and the next one begins."""
    drain = DrainRate(prior_hold_s, 0.0)
    ends = []
    for slot in range(slots):
        drain.take(0.0)
        ends.append(hold_s * (slot + 1) / slots)
    while (now := min(ends)) < seconds:
        ends.remove(now)
        drain.give_back(now)
        drain.take(now)
        ends.append(now + hold_s)
    drain.per_s(seconds)
    return drain


@pytest.mark.parametrize(("slots", "hold_s"), [(1, 0.2), (4, 2.0), (20, 0.5), (16, 8.0)])
def test_a_full_service_drains_as_fast_as_its_answers_end(slots: int, hold_s: float) -> None:
    drain = busy(slots, hold_s, 120.0)
    assert drain.per_s(120.0) == pytest.approx(slots / hold_s, rel=0.1)
    assert drain.wait_s(9, 120.0) == pytest.approx(10 * hold_s / slots, rel=0.1)


def test_half_full_the_rate_of_each_slot_is_known_all_the_same() -> None:
    drain = busy(4, 2.0, 120.0)
    for _ in range(4):
        drain.take(120.0)
    assert drain.per_s(120.0) == pytest.approx(4.0, rel=0.1)


def test_before_the_first_answer_the_prior_counts() -> None:
    drain = DrainRate(5.0, 0.0)
    drain.take(0.0)
    assert drain.wait_s(0, 0.0) == pytest.approx(5.0)


def test_a_service_that_hangs_drains_more_slowly_every_second() -> None:
    drain = busy(8, 0.5, 60.0)
    waits_s = [drain.wait_s(0, 60.0 + hung_s) for hung_s in (0.0, 10.0, 30.0, 60.0)]
    assert waits_s == sorted(waits_s)
    assert waits_s[-1] > 4.0 * waits_s[0]


def test_requests_that_are_refused_at_once_free_no_slot() -> None:
    drain = busy(2, 1.0, 60.0)
    before = drain.per_s(60.0)
    for _ in range(50):
        drain.take(60.0)
        drain.give_back(60.0, answered=False)
    assert drain.per_s(60.0) == pytest.approx(before)


def test_refused_clients_come_back_one_after_the_other_at_the_drain_rate() -> None:
    drain = busy(4, 2.0, 120.0)
    times_s = [drain.retry_after_s(1.0, 120.0, lambda: 0.0) for _ in range(10)]
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
    assert times_s[0] == pytest.approx(1.5, rel=0.1)
    assert gaps_s == pytest.approx([0.5] * 9, rel=0.1)


@given(
    after_s=st.floats(0.0, 1e6),
    refused=st.integers(1, 50),
    draw=st.floats(0.0, 1.0, exclude_max=True),
)
def test_no_client_is_sent_away_for_ever_or_for_no_time(
    after_s: float, refused: int, draw: float
) -> None:
    drain = DrainRate(1.0, 0.0)
    times_s = [drain.retry_after_s(after_s, 0.0, lambda: draw) for _ in range(refused)]
    assert all(MIN_RETRY_AFTER_S <= t <= MAX_RETRY_AFTER_S * (1 + JITTER_RATIO) for t in times_s)


def test_the_jitter_comes_from_the_random_numbers_given() -> None:
    early, late = DrainRate(1.0, 0.0), DrainRate(1.0, 0.0)
    assert late.retry_after_s(4.0, 0.0, lambda: 0.9) > early.retry_after_s(4.0, 0.0, lambda: 0.1)
