"""Replica selection: seconds, affinity, balance, saturation, adapters, locality, exploration."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.replicas.first_token import FirstTokenEstimator
from calm_serve.replicas.ranking import ADAPTER_LOAD_S, ReplicaRequest, rank_for_prompt
from calm_serve.testing import FakeClock
from calm_serve.types import ReplicaState

NAMES = ["r0", "r1", "r2", "r3", "r4"]
S_PER_TOKEN = 1e-4  # assumed before any answer


def replica(
    name: str,
    queue_length: int = 0,
    node_id: str = "here",
    adapters: tuple[str, ...] = (),
    max_queue_length: int = 20,
) -> ReplicaState:
    return ReplicaState(
        replica_id=name,
        node_id=node_id,
        queue_length=queue_length,
        max_queue_length=max_queue_length,
        adapters=adapters,
    )


FLEET = [replica(n) for n in NAMES]


def estimator_of(names: Sequence[str] = NAMES) -> FirstTokenEstimator:
    estimator = FirstTokenEstimator(1000, FakeClock())
    estimator.retain(names)
    return estimator


def chain_of(conversation: int, blocks: int) -> tuple[int, ...]:
    return tuple(1000 * conversation + i for i in range(blocks))


def rank(
    request: ReplicaRequest,
    replicas: Sequence[ReplicaState],
    chain: tuple[int, ...] = (),
    estimator: FirstTokenEstimator | None = None,
    *,
    exploration_ratio: float = 0.0,
    random: Random | None = None,
) -> list[list[str]]:
    return rank_for_prompt(
        replace(request, prompt_tokens=request.prompt_tokens or 32 * len(chain)),
        chain,
        replicas,
        estimator or estimator_of(),
        local_node_id="here",
        random=random or Random(0),
        exploration_ratio=exploration_ratio,
    )


def first(
    request: ReplicaRequest,
    replicas: Sequence[ReplicaState] = FLEET,
    chain: tuple[int, ...] = (),
    estimator: FirstTokenEstimator | None = None,
) -> str:
    return rank(request, replicas, chain, estimator)[0][0]


STATES = st.lists(
    st.builds(
        replica,
        st.sampled_from(NAMES),
        st.integers(0, 25),
        st.sampled_from(["here", "there"]),
        st.sampled_from([(), ("sql",), ("sql", "json")]),
    ),
    unique_by=lambda r: r.replica_id,
    max_size=5,
)
REQUESTS = st.builds(
    ReplicaRequest,
    decision_id=st.sampled_from(["d1", "d2"]),
    prefix_family=st.sampled_from(["", "f1", "f2"]),
    session_key=st.sampled_from(["", "s1", "s2"]),
    adapter=st.sampled_from(["", "sql", "absent"]),
)
# Prompts that were served: conversation, blocks, replica.
SERVED = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 30), st.sampled_from([*NAMES, "gone"])), max_size=8
)


def after(served: Sequence[tuple[int, int, str]]) -> FirstTokenEstimator:
    estimator = estimator_of()
    for number, (conversation, blocks, name) in enumerate(served):
        estimator.sent(f"sent {number}", chain_of(conversation, blocks), 32 * blocks, name)
    return estimator


@given(REQUESTS, STATES, SERVED, st.sampled_from([0.0, 0.5, 1.0]), st.integers())
def test_every_replica_appears_exactly_once(
    request: ReplicaRequest,
    replicas: list[ReplicaState],
    served: list[tuple[int, int, str]],
    ratio: float,
    seed: int,
) -> None:
    ranked = rank(
        request,
        replicas,
        chain_of(0, 8),
        after(served),
        exploration_ratio=ratio,
        random=Random(seed),
    )
    assert sorted(r for group in ranked for r in group) == sorted(r.replica_id for r in replicas)
    assert all(ranked)


@given(REQUESTS, STATES, SERVED, st.randoms())
def test_equal_input_gives_equal_output_in_whatever_order_replicas_come(
    request: ReplicaRequest,
    replicas: list[ReplicaState],
    served: list[tuple[int, int, str]],
    dice: Random,
) -> None:
    shuffled = list(replicas)
    dice.shuffle(shuffled)
    expected = rank(request, replicas, chain_of(0, 8), after(served), random=Random(1))
    assert rank(request, shuffled, chain_of(0, 8), after(served), random=Random(2)) == expected


@given(REQUESTS, STATES, SERVED, st.sampled_from([0.0, 1.0]))
def test_saturated_replicas_are_one_last_group(
    request: ReplicaRequest,
    replicas: list[ReplicaState],
    served: list[tuple[int, int, str]],
    ratio: float,
) -> None:
    full = {r.replica_id for r in replicas if r.queue_length >= r.max_queue_length}
    ranked = rank(request, replicas, chain_of(0, 8), after(served), exploration_ratio=ratio)
    if full:
        assert set(ranked[-1]) == full
        ranked = ranked[:-1]
    assert all(len(group) == 1 and group[0] not in full for group in ranked)


def test_the_replica_with_the_fewest_seconds_to_the_first_token_wins() -> None:
    estimator = estimator_of(["a", "b", "c"])
    for number, (name, tokens) in enumerate([("a", 9000), ("b", 3000), ("c", 6000)]):
        estimator.sent(f"d{number}", (), tokens, name)
    fleet = [replica(n) for n in "abc"]
    assert rank(ReplicaRequest("d"), fleet, estimator=estimator) == [["b"], ["c"], ["a"]]


def test_a_conversation_stays_until_moving_gains_more_than_its_prefix_costs_to_compute() -> None:
    chain = chain_of(1, 40)
    request = ReplicaRequest("d", prefix_family="f")

    def chosen(work_ahead_s: float) -> str:
        estimator = estimator_of()
        for name in NAMES:  # equal work in the past, but only one has it still ahead
            estimator.sent(name, (), 50_000, name)
        estimator._clock.advance(100.0)  # type: ignore[attr-defined]
        estimator.sent("first turn", chain[:30], 32 * 30, "r3")
        estimator._replicas["r3"].backlog.add(work_ahead_s, 1.0, estimator._clock())
        return first(request, chain=chain, estimator=estimator)

    prefix_s = 32 * 30 * S_PER_TOKEN
    assert chosen(0.0) == chosen(prefix_s) == "r3"
    assert chosen(40 * prefix_s) != "r3"


def test_a_session_stays_with_its_replica_until_it_is_full() -> None:
    request = ReplicaRequest("d", session_key="s")
    preferred = first(request)
    assert first(request, [replica(n, 4 if n == preferred else 0) for n in NAMES]) == preferred
    assert first(request, [replica(n, 20 if n == preferred else 0) for n in NAMES]) != preferred


def test_a_session_without_a_common_prefix_stays_where_it_was_sent() -> None:
    estimator = estimator_of()
    request = ReplicaRequest("d", session_key="s")
    elsewhere = next(n for n in NAMES if n != first(request))
    estimator.sent("d0", (), 10, elsewhere, session_key="s")
    for number in range(10):
        assert first(request, estimator=estimator) == elsewhere
        estimator.sent(f"d{number}", (), 60, elsewhere, session_key="s")


def test_losing_a_replica_moves_only_the_families_it_served() -> None:
    families = [ReplicaRequest(prefix_family=f"f{i}") for i in range(200)]
    before = [first(f) for f in families]
    fewer = [first(f, FLEET[1:]) for f in families]
    assert all(old == new for old, new in zip(before, fewer, strict=True) if old != NAMES[0])


def test_families_spread_evenly_over_idle_replicas() -> None:
    chosen = Counter(first(ReplicaRequest(prefix_family=f"f{i}"), FLEET[:4]) for i in range(4000))
    assert all(850 < count < 1150 for count in chosen.values())


def test_the_longest_cached_prefix_wins_over_the_preferred_replica() -> None:
    request = ReplicaRequest(prefix_family="f")
    chain = chain_of(1, 20)
    other = next(n for n in NAMES if n != first(request, chain=chain))
    estimator = after([(1, 8, other)])
    assert first(request, chain=chain, estimator=estimator) == other


@pytest.mark.parametrize(("kind", "moves"), [("prefix_family", True), ("session_key", False)])
def test_a_new_conversation_avoids_the_replica_that_did_most_of_the_work(
    kind: str, moves: bool
) -> None:
    """Not a named session: other routers, which do not know of that work, have to agree."""
    request = ReplicaRequest("d", **{kind: "c"})
    preferred = first(request)
    estimator = estimator_of()
    for number in range(30):
        estimator.sent(f"d{number}", (), 1000, preferred)
    estimator._clock.advance(100.0)  # type: ignore[attr-defined]
    assert (first(request, estimator=estimator) != preferred) is moves


def test_uneven_work_in_the_past_does_not_move_a_conversation_from_its_cache() -> None:
    estimator = estimator_of()
    chain = chain_of(1, 60)
    for number in range(40):
        name = "r3" if number % 5 else NAMES[number % 4]
        estimator.sent(f"d{number}", (), 300, name)
    estimator.sent("first turn", chain[:50], 1600, "r3")
    estimator._clock.advance(100.0)  # type: ignore[attr-defined]
    assert first(ReplicaRequest(prefix_family="c"), chain=chain, estimator=estimator) == "r3"
    assert first(ReplicaRequest(prefix_family="c"), estimator=estimator) != "r3"


def test_a_system_prompt_alone_does_not_tie_a_conversation_to_its_holder() -> None:
    system = chain_of(9, 6)
    estimator = estimator_of()
    for number in range(12):
        estimator.sent(f"d{number}", (*system, *chain_of(number, 4)), 320, "r1")
        for name in ("r0", "r2", "r3", "r4"):
            estimator.sent(f"{name} {number}", (), 80, name)
    estimator._clock.advance(100.0)  # type: ignore[attr-defined]
    new = (*system, *chain_of(99, 4))
    assert first(ReplicaRequest(prefix_family="c"), chain=new, estimator=estimator) != "r1"
    turn = (*system, *chain_of(3, 4), 5, 6)
    assert first(ReplicaRequest(prefix_family="c"), chain=turn, estimator=estimator) == "r1"


def test_processes_that_saw_different_turns_of_a_conversation_prefer_the_same_replica() -> None:
    system = tuple(range(100, 104))

    def process(*seen: tuple[int, ...]) -> FirstTokenEstimator:
        estimator = estimator_of()
        for number, chain in enumerate(seen):
            for name in NAMES:
                estimator.sent(f"{name} {number}", chain, 32 * len(chain), name)
        estimator._clock.advance(100.0)  # type: ignore[attr-defined]
        return estimator

    others = [(*system, 200 + i, 300 + i, 400 + i) for i in range(3)]
    one, two = process(*others), process(*others[1:])
    request = ReplicaRequest(prefix_family="f")
    for own in range(500, 540):
        turns = [(*system, own, own + 100, own + 200, -own), (*system, own, own + 100, 1, 2, 3)]
        assert first(request, chain=turns[0], estimator=one) == first(
            request, chain=turns[1], estimator=two
        )


def test_without_a_prefix_or_session_the_least_loaded_replica_wins() -> None:
    fleet = [replica("a", 3), replica("b", 1), replica("c", 2)]
    assert rank(ReplicaRequest(decision_id="d"), fleet) == [["b"], ["c"], ["a"]]


@pytest.mark.parametrize("local", ["a", "b"])
def test_between_equals_the_local_node_wins(local: str) -> None:
    fleet = [replica(n, 1, "here" if n == local else "there") for n in ("a", "b")]
    assert all(first(ReplicaRequest(decision_id=f"d{i}"), fleet) == local for i in range(20))


def test_locality_does_not_move_a_family_between_router_nodes() -> None:
    request = ReplicaRequest(prefix_family="f")
    fleet = [replica("a", 0, "here"), replica("b", 0, "there")]
    swapped = [replica("a", 0, "there"), replica("b", 0, "here")]
    assert rank(request, fleet) == rank(request, swapped)


def test_the_adapters_holder_wins_unless_loading_it_takes_less_time() -> None:
    request = ReplicaRequest("d", prefix_family="f", adapter="sql")
    for wait_s, wins in ((0.0, True), (0.5 * ADAPTER_LOAD_S, True), (3 * ADAPTER_LOAD_S, False)):
        estimator = estimator_of()
        estimator._replicas["r3"].backlog.add(wait_s, 1.0, estimator._clock())
        fleet = [replica(n, adapters=("sql",) if n == "r3" else ("json",)) for n in NAMES]
        assert (first(request, fleet, estimator=estimator) == "r3") == wins


def test_exploration_tries_another_replica_in_about_one_request_of_a_hundred() -> None:
    request = ReplicaRequest(prefix_family="f")
    preferred, estimator, dice = first(request), estimator_of(), Random(7)
    elsewhere = sum(
        rank(request, FLEET, (), estimator, exploration_ratio=0.01, random=dice)[0] != [preferred]
        for _ in range(10_000)
    )
    assert 60 < elsewhere < 140


def test_exploration_leaves_sessions_alone() -> None:
    request = ReplicaRequest(session_key="s")
    assert rank(request, FLEET, exploration_ratio=1.0) == rank(request, FLEET)


def test_exploration_never_picks_a_saturated_replica() -> None:
    fleet = [replica("a"), replica("b"), replica("c", 20)]
    request, dice = ReplicaRequest(prefix_family="f"), Random(3)
    firsts = {rank(request, fleet, exploration_ratio=1.0, random=dice)[0][0] for _ in range(50)}
    assert "c" not in firsts


def test_routers_that_know_little_of_each_other_do_not_all_send_to_the_idle_replica() -> None:
    estimator = estimator_of()
    estimator._wait_error.add(100.0)  # measured waits were seconds from the predicted ones
    for name in NAMES[1:]:
        estimator._replicas[name].backlog.add(0.5, 1.0, estimator._clock())
    requests = [ReplicaRequest(prefix_family=f"f{i}") for i in range(200)]
    assert set(Counter(first(r, estimator=estimator) for r in requests)) == set(NAMES)
    estimator = estimator_of()
    for name in NAMES[1:]:
        estimator._replicas[name].backlog.add(0.5, 1.0, estimator._clock())
    assert {first(r, estimator=estimator) for r in requests} == {NAMES[0]}


def test_the_preference_is_the_same_in_a_process_with_another_hash_seed() -> None:
    program = (
        "from random import Random\n"
        "from calm_serve.replicas import FirstTokenEstimator, ReplicaRequest, rank_for_prompt\n"
        "from calm_serve.types import ReplicaState\n"
        "fleet = [ReplicaState(f'r{i}', max_queue_length=8) for i in range(8)]\n"
        "estimator = FirstTokenEstimator(10, lambda: 0.0)\n"
        "print(rank_for_prompt(ReplicaRequest(prefix_family='f'), (), fleet, estimator,"
        " local_node_id='', random=Random(0), exploration_ratio=0.0))\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


@given(REQUESTS, STATES, SERVED, st.sampled_from([0.0, 1.0]))
def test_the_replica_to_avoid_is_ranked_with_the_last_group(
    request: ReplicaRequest,
    replicas: list[ReplicaState],
    served: list[tuple[int, int, str]],
    ratio: float,
) -> None:
    for avoid in replicas:
        again = replace(request, avoid=avoid.replica_id)
        ranked = rank(again, replicas, (), after(served), exploration_ratio=ratio)
        assert avoid.replica_id in ranked[-1]


def test_the_replica_to_avoid_is_still_used_when_it_is_the_only_one() -> None:
    assert rank(ReplicaRequest(avoid="r0"), [replica("r0")]) == [["r0"]]


def test_an_idle_replica_to_avoid_comes_before_saturated_ones() -> None:
    busy, idle = replica("r1", queue_length=25), replica("r0")
    assert rank(ReplicaRequest(avoid="r0"), [busy, idle]) == [["r0", "r1"]]
