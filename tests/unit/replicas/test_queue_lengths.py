"""What one process knows of the requests in each replica."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.replicas.queue_lengths import REPORT_LIFETIME_S, QueueLengths
from calm_serve.testing import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def queues(clock: FakeClock) -> QueueLengths:
    return QueueLengths(clock)


def test_nothing_is_known_of_a_replica_that_was_never_asked(queues: QueueLengths) -> None:
    assert queues.of("a") is None


def test_own_requests_count_from_sending_to_their_end(queues: QueueLengths) -> None:
    queues.sent("a")
    queues.sent("a")
    assert queues.of("a") == 2
    queues.finished("a")
    queues.finished("a")
    assert queues.of("a") is None


def test_a_request_that_ends_before_the_next_is_accepted_leaves_nothing_behind(
    queues: QueueLengths,
) -> None:
    queues.sent("a")
    queues.sent("a")
    queues.answered("a", 1)
    queues.finished("a")
    queues.answered("a", 2)  # the replica still counted the first one
    queues.finished("a")
    assert queues.of("a") == 0


def test_requests_of_other_processes_count_until_the_report_is_old(
    queues: QueueLengths, clock: FakeClock
) -> None:
    queues.sent("a")
    queues.answered("a", 4)
    assert queues.of("a") == 4
    queues.finished("a")
    assert queues.of("a") == 3
    clock.advance(REPORT_LIFETIME_S + 0.1)
    assert queues.of("a") is None
    queues.reported("a", 2, queues.asked("a"))
    assert queues.of("a") == 2


def test_a_report_that_was_asked_for_before_an_own_request_ended_does_not_count_it(
    queues: QueueLengths,
) -> None:
    queues.sent("a")
    asked = queues.asked("a")
    queues.finished("a")
    queues.reported("a", 1, asked)
    assert queues.of("a") == 0


def test_a_request_that_failed_without_an_answer_does_not_distort_later_ones_for_long(
    queues: QueueLengths, clock: FakeClock
) -> None:
    queues.sent("a")
    queues.finished("a")
    clock.advance(REPORT_LIFETIME_S + 0.1)
    queues.sent("a")
    queues.answered("a", 3)
    assert queues.of("a") == 3
    queues.finished("a")
    queues.finished("a")  # Serve may report an end twice when a replica dies
    assert queues.of("a") == 2


def test_an_unreachable_replica_keeps_own_requests_and_loses_its_report(
    queues: QueueLengths,
) -> None:
    queues.sent("a")
    queues.answered("a", 5)
    queues.forget("a")
    assert queues.of("a") == 1
    queues.retain({"b"})
    assert queues.of("a") is None


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_alone_a_process_never_sees_more_than_its_own_requests(seed: int, steps: int) -> None:
    """Messages travel for any time, in order; requests end in any order."""
    random = Random(seed)
    queues = QueueLengths(FakeClock())
    arriving: list[int] = []  # requests on the way to the replica
    inside: list[int] = []
    answers: list[int] = []  # counts on the way back
    ended = own = 0
    for number in range(steps):
        match random.randrange(5):
            case 0:
                queues.sent("a")
                own += 1
                arriving.append(number)
            case 1 if arriving:
                inside.append(arriving.pop(0))
                answers.append(len(inside))
            case 2 if answers:
                queues.answered("a", answers.pop(0))
            case 3 if inside:
                inside.pop(random.randrange(len(inside)))
                ended += 1
            case 4 if ended:
                ended -= 1
                own -= 1
                queues.finished("a")
        assert (queues.of("a") or 0) == own
