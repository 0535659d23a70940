"""Predicted seconds to the first token: what answers teach, and what is assumed before."""

from __future__ import annotations

import pytest

from calm_serve.replicas.first_token import MAX_IN_FLIGHT, MAX_SESSIONS, FirstTokenEstimator
from calm_serve.testing import FakeClock
from calm_serve.types import EngineFacts, PromptEnd, ReplicaState

S_PER_TOKEN = 1e-3
CHAIN = tuple(range(1, 65))  # a prompt of 2,048 tokens or more


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def estimator(clock: FakeClock) -> FirstTokenEstimator:
    estimator = FirstTokenEstimator(1000, clock)
    estimator.retain(["a", "b"])
    return estimator


def estimates(
    estimator: FirstTokenEstimator,
    chain: tuple[int, ...] = (),
    tokens: int = 1000,
    queues: tuple[int, int] = (0, 0),
    shared: int = 0,
) -> dict[str, tuple[float, ...]]:
    states = [
        ReplicaState(name, queue_length=queue) for name, queue in zip("ab", queues, strict=True)
    ]
    found = estimator.estimates(chain, shared, tokens, states)
    return dict(zip("ab", found, strict=True))


def answer(
    estimator: FirstTokenEstimator,
    replica_id: str,
    number: int,
    *,
    s_per_token: float = S_PER_TOKEN,
    queue_s: float | None = 0.0,
    counted: float = 1.0,
    queue_length: int = 0,
    s_per_request: float = 0.0,
) -> None:
    """Send a prompt of its own and let it be answered."""
    tokens = 100 + 37 * (number % 20)
    estimator.sent(f"d{number}", (), tokens, replica_id, queue_length)
    prompt = round(tokens * counted)
    prefill_s = 0.02 + s_per_token * prompt + s_per_request * queue_length
    facts = EngineFacts(
        replica_id,
        prompt_tokens=prompt,
        output_tokens=10,
        queue_s=queue_s,
        ttft_s=prefill_s + (queue_s or 0.0),
    )
    estimator.answered(f"d{number}", facts)


def test_no_prediction_starts_at_zero(estimator: FirstTokenEstimator) -> None:
    for one in estimates(estimator, queues=(1, 1)).values():
        wait_s, prefill_s, own_s, excess = one
        assert 0.0 < wait_s < 0.1
        assert prefill_s == own_s == pytest.approx(0.1)
        assert excess == 0.0
    assert estimator.request_s > 0.0


def test_rates_are_learned_per_replica_and_others_start_with_those_of_all(
    estimator: FirstTokenEstimator,
) -> None:
    for number in range(100):
        answer(estimator, "a", number)
    found = estimates(estimator)
    assert found["a"][1] == pytest.approx(1000 * S_PER_TOKEN, rel=0.1)
    for number in range(100, 200):
        answer(estimator, "b", number, s_per_token=3 * S_PER_TOKEN)
    estimator.retain(["a", "b", "c"])
    found = estimates(estimator)
    assert found["b"][1] == pytest.approx(3000 * S_PER_TOKEN, rel=0.2)
    assert found["a"][1] < 0.6 * found["b"][1]
    (new,) = estimator.estimates((), 0, 1000, [ReplicaState("c")])
    assert found["a"][1] < new.prefill_s <= 1.1 * found["b"][1]


def test_requests_in_an_engine_cost_what_answers_show(estimator: FirstTokenEstimator) -> None:
    for number in range(200):
        answer(estimator, "a", number, queue_length=number % 7, s_per_request=0.05)
    found = [estimates(estimator, queues=(n, 0))["a"][0] for n in (0, 5)]
    assert found[1] - found[0] == pytest.approx(0.25, rel=0.25)


def test_a_prefix_that_a_replica_served_need_not_be_computed(
    estimator: FirstTokenEstimator,
) -> None:
    estimator.sent("d", CHAIN[:10], 320, "a")
    found = estimates(estimator, CHAIN[:20], 640)
    assert found["a"][1] == pytest.approx(found["b"][1] / 2)


def test_a_later_turn_of_a_long_prompt_continues_it_beyond_its_chain(
    estimator: FirstTokenEstimator,
) -> None:
    estimator.sent("d", CHAIN, 9000, "a")
    found = estimates(estimator, CHAIN, 10_000)
    assert found["a"][1] == pytest.approx(found["b"][1] / 10)


def test_blocks_that_all_conversations_use_are_not_own_seconds(
    estimator: FirstTokenEstimator,
) -> None:
    estimator.sent("d", CHAIN[:8], 256, "a")
    found = estimates(estimator, CHAIN[:10], 320, shared=8)
    assert found["a"][2] == pytest.approx(found["b"][2])
    assert found["a"][1] == pytest.approx(found["b"][1] / 5)


def test_own_requests_are_work_ahead_until_they_are_computed(
    estimator: FirstTokenEstimator, clock: FakeClock
) -> None:
    estimator.sent("d", (), 20_000, "a")  # 2 s at the assumed rate
    assert estimates(estimator)["a"][0] == pytest.approx(2.0, abs=0.1)
    clock.advance(1.5)
    assert estimates(estimator)["a"][0] == pytest.approx(0.5, abs=0.1)
    assert estimates(estimator)["b"][0] < 0.01


def test_a_replica_reports_work_and_prompts_of_other_processes(
    estimator: FirstTokenEstimator,
) -> None:
    ends = (PromptEnd(CHAIN[4:6], 192), PromptEnd(CHAIN[8:10], 320))
    estimator.reported(ReplicaState("b", waiting=2, recent_prompts=ends), ends)
    found = estimates(estimator, CHAIN[:10], 320)
    assert found["b"][0] > found["a"][0]
    assert found["b"][1] < 0.1 * found["a"][1]


def test_the_less_predicted_waits_come_true_the_less_they_count(
    estimator: FirstTokenEstimator, clock: FakeClock
) -> None:
    for number in range(400):
        waits = number % 2
        if waits:
            estimator.sent(f"x{number}", (), 20_000, "a")
        answer(estimator, "a", number, s_per_token=1e-4, queue_s=(number // 2) % 3)
        clock.advance(10.0)
    estimator.sent("d", (), 20_000, "a")
    assert estimates(estimator)["a"][0] < 1.0
    assert estimator.wait_error_s > 0.3


def test_waits_that_come_true_have_no_error(
    estimator: FirstTokenEstimator, clock: FakeClock
) -> None:
    for number in range(400):
        queue_s = 0.0
        if number % 2:
            estimator.sent(f"x{number}", (), 20_000, "a")
            queue_s = estimates(estimator)["a"][0]
        answer(estimator, "a", number, s_per_token=1e-4, queue_s=queue_s)
        clock.advance(10.0)
    estimator.sent("d", (), 20_000, "a")
    assert estimates(estimator)["a"][0] == pytest.approx(2.0, rel=0.15)
    assert estimator.wait_error_s < 0.2


def test_tokens_are_counted_as_the_engine_counts_them(estimator: FirstTokenEstimator) -> None:
    for number in range(300):
        answer(estimator, "a", number, counted=1.5)
    assert estimates(estimator)["a"][1] == pytest.approx(1500 * S_PER_TOKEN, rel=0.1)


def test_an_engine_without_a_queue_time_teaches_no_rate(estimator: FirstTokenEstimator) -> None:
    before = estimates(estimator)
    for number in range(20):
        answer(estimator, "a", number, s_per_token=1.0, queue_s=None)
    assert estimates(estimator)["a"][1] == pytest.approx(before["a"][1])


def test_answers_to_unknown_requests_and_of_lost_replicas_are_ignored(
    estimator: FirstTokenEstimator,
) -> None:
    facts = EngineFacts("a", prompt_tokens=10, queue_s=0.0, ttft_s=100.0)
    before = estimates(estimator)
    estimator.answered("never sent", facts)
    estimator.sent("d", (), 10, "b")
    estimator.answered("d", facts)  # another replica than the request's
    estimator.sent("e", (), 10, "gone")
    estimator.answered("e", EngineFacts("gone", prompt_tokens=10, ttft_s=1.0))
    estimator.reported(ReplicaState("gone", waiting=3), ())
    assert estimates(estimator)["a"][:3] == before["a"][:3]


def test_work_above_the_mean_shows_and_fades_with_membership(
    estimator: FirstTokenEstimator,
) -> None:
    for number in range(20):
        estimator.sent(f"d{number}", (), 1000, "a")
    found = estimates(estimator)
    assert found["a"][3] > 0.3
    assert found["b"][3] == pytest.approx(-found["a"][3])
    estimator.retain(["b", "c"])
    (one, two) = estimator.estimates((), 0, 1, [ReplicaState("b"), ReplicaState("c")])
    assert one.excess == two.excess == 0.0


def test_the_last_replica_of_a_session_is_known_while_it_is_recent(
    estimator: FirstTokenEstimator,
) -> None:
    assert estimator.served_session("s") == estimator.served_session("") == ""
    estimator.sent("d", (), 1, "a", session_key="s")
    estimator.sent("e", (), 1, "b", session_key="s")
    assert estimator.served_session("s") == "b"
    for number in range(MAX_SESSIONS):
        estimator.sent(f"d{number}", (), 1, "a", session_key=f"s{number}")
    assert estimator.served_session("s") == ""


def test_requests_without_an_answer_are_bounded(estimator: FirstTokenEstimator) -> None:
    for number in range(MAX_IN_FLIGHT + 100):
        estimator.sent(f"d{number}", (), 10, "a")
    assert len(estimator._in_flight) == MAX_IN_FLIGHT


def test_a_cache_that_is_gone_is_forgotten(estimator: FirstTokenEstimator) -> None:
    estimator.sent("d", CHAIN[:10], 320, "a")
    estimator.emptied("a")
    found = estimates(estimator, CHAIN[:10], 320)
    assert found["a"][1] == found["b"][1]
