"""The prefix index: what it remembers, what it forgets, and its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.replicas.prefix_index import PrefixIndex
from calm_serve.types import PromptEnd

REPLICAS = st.sampled_from(["a", "b", "c"])


def chain_of(words: list[int]) -> tuple[int, ...]:
    """Hash prefixes the way real chains work: equal block means equal everything before it."""
    return tuple(hash(tuple(words[: i + 1])) for i in range(len(words)))


CHAINS = st.lists(st.integers(0, 2), max_size=6).map(chain_of)


def test_a_replica_matches_the_blocks_it_served() -> None:
    index = PrefixIndex(100)
    index.add((1, 2, 3), "a")
    assert index.match((1, 2, 3, 4)) == {"a": 3}


def test_matching_stops_at_the_first_block_that_differs() -> None:
    index = PrefixIndex(100)
    index.add((1, 2, 3), "a")
    assert index.match((1, 9, 8)) == {"a": 1}
    assert index.match((9, 8, 7)) == {}


def test_replicas_that_share_a_head_differ_in_their_tails() -> None:
    index = PrefixIndex(100)
    index.add((1, 2, 3, 4), "a")
    index.add((1, 2), "b")
    assert index.match((1, 2, 3, 4)) == {"a": 4, "b": 2}


def test_the_least_recently_added_chain_is_forgotten_first() -> None:
    index = PrefixIndex(4)
    index.add((1, 2), "a")
    index.add((3, 4), "a")
    index.add((1, 2), "b")
    index.add((5, 6), "a")
    assert index.match((3, 4)) == {}
    assert index.match((1, 2)) == {"a": 2, "b": 2}


def test_eviction_takes_tails_before_the_heads_they_depend_on() -> None:
    index = PrefixIndex(3)
    index.add((1, 2, 3, 4, 5), "a")
    assert index.match((1, 2, 3, 4, 5)) == {"a": 3}


def test_a_replica_that_is_gone_neither_matches_nor_is_added() -> None:
    index = PrefixIndex(100)
    index.add((1, 2), "a")
    index.add((1, 2), "b")
    index.retain(["b"])
    index.add((1, 2), "a")
    assert index.match((1, 2)) == {"b": 2}


def test_a_replica_whose_cache_is_gone_matches_only_what_it_served_since() -> None:
    index = PrefixIndex(100)
    index.retain(["a", "b"])
    for replica_id in ("a", "b"):
        index.add((1, 2, 3), replica_id)
    index.emptied("a")
    assert index.match((1, 2, 3)) == {"b": 3}
    index.add((1, 2), "a")
    assert index.match((1, 2, 3)) == {"a": 2, "b": 3}
    index.emptied("a")
    index.retain(["a", "c"])
    assert index.match((1, 2, 3)) == {}


def test_holders_of_a_hot_block_stay_bounded_while_replicas_come_and_go() -> None:
    index = PrefixIndex(100)
    for generation in range(50):
        index.retain([f"r{generation}"])
        index.add((1,), f"r{generation}")
    assert index._holders[1] == ("r49",)


def test_what_conversations_share_ends_where_they_part() -> None:
    index = PrefixIndex(100)
    index.add((1, 2, 3, 4, 5), "a")
    assert index.shared((1, 2, 3, 4, 6)) == 0  # a further turn of the only one
    assert index.shared((1, 2, 7, 8, 9)) == 2
    index.add((1, 2, 7, 8, 9), "a")
    assert index.shared((1, 2, 3, 4, 6)) == 2
    assert index.shared((9, 2, 3, 4, 6)) == 0


def test_a_last_block_is_partial_and_parts_nothing() -> None:
    index = PrefixIndex(100)
    index.add((1, 2, 3), "a")
    index.add((1, 2, 4, 5, 6), "a")
    assert index.shared((1, 2, 4, 5, 7, 8)) == 0
    assert index.shared((1, 9)) == 0


def test_a_replica_tells_of_prompts_that_other_processes_sent() -> None:
    index = PrefixIndex(100)
    index.retain(["a", "b"])
    index.add((1, 2), "b", 60)
    index.reported("a", [PromptEnd((3, 4), 120)])
    assert index.match((1, 2, 3, 4, 5, 6)) == {"a": 4, "b": 2}
    assert index.match((1, 2, 3, 9)) == {"a": 3, "b": 2}  # its last block was partial
    assert index.lengths((1, 2, 3, 4)) == {"a": 120}


def test_a_report_of_a_replica_that_is_gone_is_ignored() -> None:
    index = PrefixIndex(100)
    index.retain(["b"])
    index.reported("a", [PromptEnd((3, 4), 120)])
    assert index.match((1, 2, 3, 4)) == {}
    assert len(index) == 0


def test_the_longest_prompt_behind_a_chain_is_known_by_replica() -> None:
    index = PrefixIndex(100)
    index.add((1, 2), "a", 5000)
    index.add((1, 2), "a", 4000)
    index.add((1, 2), "b", 3000)
    assert index.lengths((1, 2)) == {"a": 5000, "b": 3000}
    assert index.lengths((1,)) == index.lengths(()) == {}


def test_lengths_follow_a_replica_that_lost_its_cache() -> None:
    index = PrefixIndex(100)
    index.retain(["a", "b"])
    index.add((1, 2), "a", 5000)
    index.emptied("a")
    index.add((1, 2), "a", 300)
    assert index.lengths((1, 2))["a"] == 300


def test_more_replicas_make_more_room() -> None:
    index = PrefixIndex(2)
    index.retain(["a", "b"])
    index.add((1, 2, 3, 4), "a")
    assert len(index) == index.max_blocks == 4
    index.retain(["a"])
    index.add((5,), "a")
    assert len(index) == index.max_blocks == 4  # it is not swept when a replica is lost


def test_an_index_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks_per_replica"):
        PrefixIndex(0)


def test_integrity_check_notices_a_broken_invariant() -> None:
    index = PrefixIndex(1)
    index._holders[1] = ()
    with pytest.raises(AssertionError, match="no holder"):
        index.check_integrity()
    index._holders[1] = ("a", "a")
    with pytest.raises(AssertionError, match="twice"):
        index.check_integrity()
    index._holders[1] = index._holders[2] = ("a",)
    with pytest.raises(AssertionError, match="exceed"):
        index.check_integrity()
    del index._holders[2]
    index._next[2] = 1
    with pytest.raises(AssertionError, match="successor"):
        index.check_integrity()
    index._next.clear()
    index._lengths[2] = {"a": 1}
    with pytest.raises(AssertionError, match="length"):
        index.check_integrity()


@given(st.lists(st.tuples(CHAINS, REPLICAS)), CHAINS)
def test_with_room_for_everything_matches_are_the_longest_common_prefixes(
    added: list[tuple[tuple[int, ...], str]], asked: tuple[int, ...]
) -> None:
    index = PrefixIndex(10_000)
    expected: dict[str, int] = {}
    for chain, replica in added:
        index.add(chain, replica)
        common = len([1 for mine, theirs in zip(chain, asked, strict=False) if mine == theirs])
        if common:
            expected[replica] = max(expected.get(replica, 0), common)
    assert index.match(asked) == expected
    index.check_integrity()


@given(
    st.integers(1, 8),
    st.lists(st.one_of(st.tuples(CHAINS, REPLICAS), st.frozensets(REPLICAS))),
    CHAINS,
)
def test_bounds_and_membership_hold_after_any_history(
    blocks_per_replica: int,
    history: list[tuple[tuple[int, ...], str] | frozenset[str]],
    asked: tuple[int, ...],
) -> None:
    index = PrefixIndex(blocks_per_replica)
    live = frozenset({"a", "b", "c"})
    for step in history:
        if isinstance(step, frozenset):
            live = step
            index.retain(step)
        else:
            index.add(*step)
    index.check_integrity()
    assert len(index) <= 3 * blocks_per_replica
    matched = index.match(asked)
    assert set(matched) <= live
    assert all(0 < blocks <= len(asked) for blocks in matched.values())
    assert 0 <= index.shared(asked) <= max(len(asked) - 2, 0)
