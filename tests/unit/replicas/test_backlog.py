"""The virtual queue of one replica: own requests, time, and what the replica reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.replicas.backlog import MAX_WAITING, Backlog, MeanPrompt

MEAN = MeanPrompt(tokens=1000.0, prefill_s=1.0)


def backlog_of(*works_s: float) -> Backlog:
    """Return a backlog to which all of this was sent at 10 s."""
    backlog = Backlog()
    for work_s in works_s:
        backlog.add(work_s, 1000.0 * work_s, 10.0)
    return backlog


def test_time_drains_what_own_requests_add() -> None:
    backlog = backlog_of(2.0, 3.0)
    assert [backlog.wait_s(at_s) for at_s in (10.0, 14.0, 15.0, 99.0)] == [5.0, 1.0, 0.0, 0.0]


def test_a_request_that_was_not_accepted_is_taken_back() -> None:
    backlog = backlog_of(2.0, 3.0)
    backlog.add(7.0, 7000.0, 10.0)
    backlog.remove(7.0)
    assert backlog.wait_s(10.0) == 5.0
    backlog.reported(1, 10.5, MEAN)  # it does not count among those that wait
    assert backlog.wait_s(10.5) == 4.5


def test_a_report_of_own_requests_alone_changes_nothing() -> None:
    backlog = backlog_of(2.0, 3.0, 4.0)
    backlog.reported(2, 10.5, MEAN)
    assert backlog.wait_s(10.5) == 8.5


def test_waiting_requests_that_are_not_own_are_work_of_others() -> None:
    backlog = backlog_of(2.0, 3.0)
    backlog.reported(4, 11.0, MEAN)  # one of them is own, and one request is at work
    assert backlog.wait_s(11.0) == pytest.approx(3.0 + 3 * 1.0 + 0.5)


def test_prompts_of_others_count_with_their_lengths() -> None:
    backlog = backlog_of(2.0, 3.0)
    backlog.reported(3, 11.0, MEAN, lengths=[9000, 2000, 3000, 5000, 700])
    # Of the three that wait, 8,700 tokens in all, one is own and has 3,000.
    assert backlog.wait_s(11.0) == pytest.approx(3.0 + 5.7 + 0.5)


def test_an_engine_that_is_faster_than_predicted_has_less_ahead() -> None:
    backlog = backlog_of(2.0, 3.0, 4.0, 1.0)
    backlog.reported(1, 10.5, MEAN)
    assert backlog.wait_s(10.5) == pytest.approx(1.0 + 1.0)  # the last one, and one at work


def test_requests_sent_since_a_report_may_have_been_missing_from_it() -> None:
    backlog = backlog_of(2.0, 3.0, 4.0)
    backlog.reported(0, 10.5, MEAN, delay_s=1.0)
    assert backlog.wait_s(10.5) == 8.5
    backlog.reported(0, 10.5, MEAN, delay_s=0.1)
    assert backlog.wait_s(10.5) == 4.0  # nothing waits, the last one may be at work


def test_an_idle_engine_ends_a_wait_that_others_were_thought_to_cause() -> None:
    backlog = Backlog()
    backlog.reported(20, 10.0, MEAN)
    assert backlog.wait_s(10.0) == 20.5
    backlog.reported(0, 11.0, MEAN)
    assert backlog.wait_s(11.0) == 1.0


def test_a_small_difference_is_none() -> None:
    backlog = backlog_of(2.0, 3.0)
    backlog.reported(2, 10.5, MEAN, lengths=[3200, 0])
    assert backlog.wait_s(10.5) == pytest.approx(3.0 + 0.2 + 0.5, abs=0.81)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.floats(0.0, 10.0), st.integers(0, 5000)),
            st.tuples(st.just("report"), st.floats(0.0, 3.0), st.integers(0, 50)),
        ),
        max_size=30,
    )
)
def test_waits_are_never_negative_and_bounded_by_all_the_work(
    steps: list[tuple[str, float, int]],
) -> None:
    backlog, now_s, most_s = Backlog(), 0.0, 0.0
    for kind, seconds, number in steps:
        if kind == "add":
            backlog.add(seconds, number, now_s)
            most_s += seconds
        else:
            now_s += seconds
            backlog.reported(number, now_s, MEAN)
            most_s += number + 0.5
        assert 0.0 <= backlog.wait_s(now_s) <= most_s + 1e-6


def test_own_requests_are_bounded() -> None:
    backlog = backlog_of(*[1.0] * (MAX_WAITING + 50))
    assert len(backlog._own) == MAX_WAITING
