"""What `calm_serve.testing` offers to others: factories that need nothing, a queue that adds up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve import testing
from calm_serve.testing import EngineSimulator, FakeClock, make_decision, make_fleet, make_spec

REQUESTS = st.lists(
    st.tuples(st.floats(0.0, 1.0), st.integers(1, 2000), st.integers(1, 200)), max_size=40
)
SPEC = make_spec()


def served(
    slots: int, requests: list[tuple[float, int, int]], seed: int = 0
) -> list[testing.Served]:
    engine = EngineSimulator(SPEC, slots=slots, jitter_ratio=0.5, seed=seed)
    at_s, answers = 0.0, []
    for gap_s, prompt, output in requests:
        at_s += gap_s
        answers.append(engine.submit(at_s, prompt, output))
    return answers


def test_everything_public_is_exported_and_documented() -> None:
    public = {
        name
        for name, value in vars(testing).items()
        if getattr(value, "__module__", "") == testing.__name__ and not name.startswith("_")
    }
    assert public == set(testing.__all__)
    assert all(getattr(testing, name).__doc__ for name in testing.__all__)


@pytest.mark.parametrize("name", [n for n in testing.__all__ if n.startswith("make_")])
def test_every_factory_works_without_arguments_and_refuses_unknown_fields(name: str) -> None:
    factory = getattr(testing, name)
    assert factory() == factory()
    with pytest.raises((TypeError, ValueError), match="no_such_field"):
        factory(no_such_field=1)


def test_a_decision_is_consistent_with_its_context_and_ranking() -> None:
    decision = make_decision("a", "b", decision_id="d")
    assert decision.context.request_id == decision.decision_id == "d"
    assert decision.ranking == ("a", "b")
    assert [c.slm_id for c in decision.candidates] == ["a", "b"]


def test_a_fleet_may_be_given_its_slms() -> None:
    assert [s.id for s in make_fleet(make_spec("x")).slms] == ["x"]
    assert len(make_fleet().slms) == 2


def test_a_clock_moves_only_in_advance_and_only_forwards() -> None:
    clock = FakeClock(5.0)
    assert clock() == clock() == 5.0
    clock.advance(1.5)
    assert clock() == 6.5
    with pytest.raises(ValueError, match="back"):
        clock.advance(-1)


@given(st.integers(1, 8), REQUESTS)
def test_no_more_requests_run_at_once_than_there_are_slots(
    slots: int, requests: list[tuple[float, int, int]]
) -> None:
    answers = served(slots, requests)
    for answer in answers:
        together = [a for a in answers if a.started_s <= answer.started_s < a.ended_s]
        assert len(together) <= slots
        assert answer.arrived_s <= answer.started_s < answer.first_token_s <= answer.ended_s


@given(st.integers(1, 8), REQUESTS)
def test_requests_start_in_the_order_they_came_and_wait_only_for_a_slot(
    slots: int, requests: list[tuple[float, int, int]]
) -> None:
    answers = served(slots, requests)
    starts = [a.started_s for a in answers]
    assert starts == sorted(starts)
    for i, answer in enumerate(answers):
        if answer.started_s > answer.arrived_s:
            busy = [a for a in answers[:i] if a.ended_s >= answer.started_s]
            assert len(busy) >= slots


@given(st.integers(1, 8), REQUESTS, st.integers())
def test_the_same_seed_gives_the_same_times(
    slots: int, requests: list[tuple[float, int, int]], seed: int
) -> None:
    assert served(slots, requests, seed) == served(slots, requests, seed)


def test_the_reported_load_is_what_is_inside() -> None:
    engine = EngineSimulator(SPEC, slots=2, prefill_s_per_token=0.0, tpot_s=0.1)
    for _ in range(3):
        engine.submit(1.0, 10, 10)  # one second each
    replica = engine.replica(1.5)
    assert (replica.running, replica.waiting, replica.queue_length) == (2, 1, 3)
    later = engine.state(2.5)
    assert (later.running, later.waiting, later.capacity) == (1, 0, 2)
    assert engine.replica(3.5).queue_length == 0


def test_submissions_must_be_in_time_order() -> None:
    engine = EngineSimulator(SPEC)
    engine.submit(2.0, 1, 1)
    with pytest.raises(ValueError, match=r"the last one was at 2\.0"):
        engine.submit(1.0, 1, 1)


def test_a_slower_pace_stretches_the_service_alone() -> None:
    usual, slow = (EngineSimulator(make_spec(), tpot_s=0.01, prefill_s_per_token=0.0) for _ in "ab")
    first, second = usual.submit(1.0, 10, 11), slow.submit(1.0, 10, 11, pace=5.0)
    assert (first.ttft_s, first.ended_s) == pytest.approx((0.01, 1.11))
    assert (second.ttft_s, second.ended_s) == pytest.approx((0.05, 1.55))
