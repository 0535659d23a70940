"""Replica selection: affinity, bounded load, saturation, adapters, locality, exploration."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.replicas.prefix_index import PrefixIndex
from calm_serve.replicas.ranking import (
    LOAD_BOUND_RATIO,
    ReplicaRequest,
    rank_for_prompt,
    rank_replicas,
)
from calm_serve.types import ReplicaState


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


def rank(
    request: ReplicaRequest,
    replicas: list[ReplicaState],
    matches: dict[str, int] | None = None,
    *,
    exploration_ratio: float = 0.0,
    random: Random | None = None,
) -> list[list[str]]:
    return rank_replicas(
        request,
        replicas,
        matches or {},
        local_node_id="here",
        random=random or Random(0),
        exploration_ratio=exploration_ratio,
    )


NAMES = ["r0", "r1", "r2", "r3", "r4"]
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
MATCHES = st.dictionaries(st.sampled_from([*NAMES, "gone"]), st.integers(1, 30))


@given(REQUESTS, STATES, MATCHES, st.sampled_from([0.0, 0.5, 1.0]), st.integers())
def test_every_replica_appears_exactly_once(
    request: ReplicaRequest,
    replicas: list[ReplicaState],
    matches: dict[str, int],
    ratio: float,
    seed: int,
) -> None:
    ranked = rank(request, replicas, matches, exploration_ratio=ratio, random=Random(seed))
    assert sorted(r for group in ranked for r in group) == sorted(r.replica_id for r in replicas)
    assert all(ranked)


@given(REQUESTS, STATES, MATCHES, st.randoms())
def test_equal_input_gives_equal_output_in_whatever_order_replicas_come(
    request: ReplicaRequest, replicas: list[ReplicaState], matches: dict[str, int], dice: Random
) -> None:
    shuffled = list(replicas)
    dice.shuffle(shuffled)
    first = rank(request, replicas, matches, random=Random(1))
    assert rank(request, shuffled, matches, random=Random(2)) == first


@given(REQUESTS, STATES, MATCHES, st.sampled_from([0.0, 1.0]))
def test_saturated_replicas_are_one_last_group(
    request: ReplicaRequest, replicas: list[ReplicaState], matches: dict[str, int], ratio: float
) -> None:
    full = {r.replica_id for r in replicas if r.queue_length >= r.max_queue_length}
    ranked = rank(request, replicas, matches, exploration_ratio=ratio)
    if full:
        assert set(ranked[-1]) == full
        ranked = ranked[:-1]
    assert all(len(group) == 1 and group[0] not in full for group in ranked)


@given(REQUESTS, STATES, MATCHES, st.sampled_from([0.0, 1.0]))
def test_the_adapter_wins_over_everything_but_saturation(
    request: ReplicaRequest, replicas: list[ReplicaState], matches: dict[str, int], ratio: float
) -> None:
    by_id = {r.replica_id: r for r in replicas}
    order = [by_id[g[0]] for g in rank(request, replicas, matches, exploration_ratio=ratio)]
    free = [r for r in order if r.queue_length < r.max_queue_length]
    holds = [request.adapter in r.adapters for r in free]
    assert holds == sorted(holds, reverse=True)


@given(REQUESTS, STATES, MATCHES)
def test_the_first_choice_is_never_above_the_load_bound_of_its_peers(
    request: ReplicaRequest, replicas: list[ReplicaState], matches: dict[str, int]
) -> None:
    by_id = {r.replica_id: r for r in replicas}
    ranked = rank(request, replicas, matches)
    free = [r for r in replicas if r.queue_length < r.max_queue_length]
    peers = [r for r in free if request.adapter in r.adapters] or free
    if request.adapter == "" or not peers:
        peers = free
    if peers:
        mean = sum(r.queue_length for r in peers) / len(peers)
        first = by_id[ranked[0][0]]
        assert first.queue_length <= math.ceil(LOAD_BOUND_RATIO * (mean + 1))


@given(st.text(min_size=1), st.lists(st.integers(0, 3), min_size=4, max_size=4), MATCHES)
def test_a_session_stays_with_its_replica_while_loads_are_within_the_bound(
    session: str, loads: list[int], matches: dict[str, int]
) -> None:
    request = ReplicaRequest(session_key=session)
    preferred = rank(request, [replica(n) for n in NAMES[:4]])[0]
    # The most that cannot exceed ceil(1.5 * (mean + 1)) for any other loads is 2.
    busy = [replica(n, min(q, 2)) for n, q in zip(NAMES, loads, strict=False)]
    assert rank(request, busy, matches)[0] == preferred


def test_a_session_spills_to_another_replica_when_its_preferred_replica_is_far_above_the_mean() -> (
    None
):
    request = ReplicaRequest(session_key="s")
    preferred = rank(request, [replica("a"), replica("b")])[0][0]
    loaded = [replica(n, 12 if n == preferred else 0) for n in ("a", "b")]
    assert rank(request, loaded)[0] != [preferred]


def test_losing_a_replica_moves_only_the_families_it_served() -> None:
    fleet = [replica(n) for n in NAMES]
    families = [ReplicaRequest(prefix_family=f"f{i}") for i in range(200)]
    before = [rank(f, fleet)[0][0] for f in families]
    after = [rank(f, fleet[1:])[0][0] for f in families]
    assert all(old == new for old, new in zip(before, after, strict=True) if old != NAMES[0])


def test_families_spread_evenly_over_idle_replicas() -> None:
    fleet = [replica(n) for n in NAMES[:4]]
    chosen = Counter(rank(ReplicaRequest(prefix_family=f"f{i}"), fleet)[0][0] for i in range(4000))
    assert all(850 < count < 1150 for count in chosen.values())


def test_the_longest_prefix_match_refines_the_family_preference() -> None:
    request = ReplicaRequest(prefix_family="f")
    fleet = [replica(n) for n in NAMES]
    last = rank(request, fleet)[-1][0]
    assert rank(request, fleet, {last: 4, "r0" if last != "r0" else "r1": 1})[0] == [last]


def test_the_preferred_replica_is_kept_when_another_replica_has_only_a_little_more() -> None:
    request = ReplicaRequest(prefix_family="f", prompt_blocks=20)
    fleet = [replica(n) for n in NAMES]
    order = [group[0] for group in rank(request, fleet)]
    assert rank(request, fleet, {order[0]: 16, order[1]: 20})[0] == [order[0]]
    assert rank(request, fleet, {order[0]: 2, order[1]: 20})[0] == [order[1]]


def test_a_match_outweighs_a_short_queue_but_not_a_long_one() -> None:
    request = ReplicaRequest(prefix_family="f", prompt_blocks=10)
    fleet = [replica(n) for n in NAMES]
    holder = rank(request, fleet)[0][0]

    def first(queue: int) -> list[str]:
        states = [replica(n, queue if n == holder else 2) for n in NAMES]
        return rank(request, states, {holder: 10})[0]

    assert first(4) == [holder]
    assert first(15) != [holder]


def ranked_by_work(request: ReplicaRequest, matches: dict[str, int], busy: str) -> list[str]:
    fleet = [replica(n) for n in NAMES]
    work = {n: 3000.0 if n == busy else 1000.0 for n in NAMES}
    return rank_replicas(
        request, fleet, matches, work, local_node_id="", random=Random(0), exploration_ratio=0.0
    )[0]


def test_a_new_conversation_avoids_the_replica_that_did_most_of_the_work() -> None:
    request = ReplicaRequest(prefix_family="c", prompt_blocks=10)
    preferred = rank(request, [replica(n) for n in NAMES])[0][0]
    assert ranked_by_work(request, {}, busy=preferred) != [preferred]
    assert ranked_by_work(request, {}, busy=NAMES[NAMES.index(preferred) - 1]) == [preferred]


def test_a_named_session_keeps_its_replica_at_any_work_that_this_process_gave_it() -> None:
    request = ReplicaRequest(session_key="c", prompt_blocks=10)
    preferred = rank(request, [replica(n) for n in NAMES])[0][0]
    assert all(ranked_by_work(request, {}, busy=name) == [preferred] for name in NAMES)


@pytest.mark.parametrize("kind", ["prefix_family", "session_key"])
def test_work_in_the_past_does_not_move_a_conversation_from_its_cache(kind: str) -> None:
    request = ReplicaRequest(**{kind: "c"}, prompt_blocks=10)
    preferred = rank(request, [replica(n) for n in NAMES])[0][0]
    assert ranked_by_work(request, {preferred: 8}, busy=preferred) == [preferred]


def test_a_system_prompt_alone_does_not_tie_a_conversation_to_its_holder() -> None:
    request = ReplicaRequest(prefix_family="c", prompt_blocks=10, shared_blocks=8)
    fleet = [replica(n) for n in NAMES]
    preferred, *_, other = (group[0] for group in rank(request, fleet))
    assert rank(request, fleet, {other: 8})[0] == [preferred]
    assert rank(request, fleet, {other: 10})[0] == [other]


def test_processes_that_saw_different_turns_of_a_conversation_prefer_the_same_replica() -> None:
    system, fleet = tuple(range(100, 104)), [replica(n) for n in NAMES]

    def process(*seen: tuple[int, ...]) -> PrefixIndex:
        index = PrefixIndex(1000)
        for number, chain in enumerate(seen):
            index.add(chain, NAMES[number % len(NAMES)])
        return index

    others = [(*system, 200 + i, 300 + i, 400 + i) for i in range(3)]
    first, second = process(*others), process(*others[1:])
    disagreements = 0
    for own in range(500, 540):
        turns = [(*system, own, own + 100, own + 200, -own), (*system, own, own + 100, 1, 2, 3)]
        chosen = [
            rank_for_prompt(
                ReplicaRequest(prefix_family="f"),
                turn,
                fleet,
                index,
                local_node_id="",
                random=Random(0),
                exploration_ratio=0.0,
            )[0]
            for index, turn in zip((first, second), turns, strict=True)
        ]
        disagreements += chosen[0] != chosen[1]
    assert disagreements == 0


def test_without_a_prefix_or_session_the_least_loaded_replica_wins() -> None:
    request = ReplicaRequest(decision_id="d")
    assert rank(request, [replica("a", 3), replica("b", 1), replica("c", 2)]) == [
        ["b"],
        ["c"],
        ["a"],
    ]


@pytest.mark.parametrize("local", ["a", "b"])
def test_between_equals_the_local_node_wins(local: str) -> None:
    fleet = [replica(n, 1, "here" if n == local else "there") for n in ("a", "b")]
    assert all(rank(ReplicaRequest(decision_id=f"d{i}"), fleet)[0] == [local] for i in range(20))


def test_locality_does_not_move_a_family_between_router_nodes() -> None:
    request = ReplicaRequest(prefix_family="f")
    fleet = [replica("a", 0, "here"), replica("b", 0, "there")]
    swapped = [replica("a", 0, "there"), replica("b", 0, "here")]
    assert rank(request, fleet) == rank(request, swapped)


def test_exploration_tries_another_replica_in_about_one_request_of_a_hundred() -> None:
    request = ReplicaRequest(prefix_family="f")
    fleet = [replica(n) for n in NAMES]
    preferred = rank(request, fleet)[0]
    dice = Random(7)
    elsewhere = sum(
        rank(request, fleet, exploration_ratio=0.01, random=dice)[0] != preferred
        for _ in range(10_000)
    )
    assert 60 < elsewhere < 140


def test_exploration_leaves_sessions_alone() -> None:
    request = ReplicaRequest(session_key="s")
    fleet = [replica(n) for n in NAMES]
    assert rank(request, fleet, exploration_ratio=1.0) == rank(request, fleet)


def test_exploration_never_picks_a_replica_above_the_load_bound() -> None:
    fleet = [replica("a"), replica("b"), replica("c", 15)]
    request = ReplicaRequest(prefix_family="f")
    dice = Random(3)
    firsts = {rank(request, fleet, exploration_ratio=1.0, random=dice)[0][0] for _ in range(50)}
    assert "c" not in firsts


def test_the_preference_is_the_same_in_a_process_with_another_hash_seed() -> None:
    program = (
        "from random import Random\n"
        "from calm_serve.replicas.ranking import ReplicaRequest, rank_replicas\n"
        "from calm_serve.types import ReplicaState\n"
        "fleet = [ReplicaState(f'r{i}', max_queue_length=8) for i in range(8)]\n"
        "print(rank_replicas(ReplicaRequest(prefix_family='f'), fleet, {}, local_node_id='',"
        " random=Random(0), exploration_ratio=0.0))\n"
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


@given(REQUESTS, STATES, MATCHES, st.sampled_from([0.0, 1.0]))
def test_the_replica_to_avoid_is_ranked_with_the_last_group(
    request: ReplicaRequest, replicas: list[ReplicaState], matches: dict[str, int], ratio: float
) -> None:
    for avoid in replicas:
        again = replace(request, avoid=avoid.replica_id)
        assert avoid.replica_id in rank(again, replicas, matches, exploration_ratio=ratio)[-1]


def test_the_replica_to_avoid_is_still_used_when_it_is_the_only_one() -> None:
    assert rank(ReplicaRequest(avoid="r0"), [replica("r0")]) == [["r0"]]


def test_an_idle_replica_to_avoid_comes_before_saturated_ones() -> None:
    busy, idle = replica("r1", queue_length=25), replica("r0")
    assert rank(ReplicaRequest(avoid="r0"), [busy, idle]) == [["r0", "r1"]]
