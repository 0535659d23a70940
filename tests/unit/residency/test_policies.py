"""Residency policies against one another on traces whose optimum is known."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.config import ResidencyOptions
from calm_serve.config.residency import ResidencyPolicyName
from calm_serve.residency.policies import build
from calm_serve.residency.records import ModelFootprint
from calm_serve.types import Residency
from load_tests.paper.simulated.belady import belady, belady_bound
from load_tests.paper.simulated.replay import (
    Replayed,
    ids_of,
    replay,
)

IDS = "abcdef"
SLOTS = 3


def footprints(sizes: dict[str, int] | None = None) -> list[ModelFootprint]:
    sizes = sizes or dict.fromkeys(IDS, 1)
    return [
        ModelFootprint(i, {"node": n}, Residency.ASLEEP, wake_s=0.3, wake_j=0.3, answer_s=0.3)
        for i, n in sizes.items()
    ]


def run(
    policy: str, trace: list[tuple[float, str]], budget: int = SLOTS, **fields: Any
) -> Replayed:
    options = ResidencyOptions(
        memory_budget_bytes=budget, policy=ResidencyPolicyName(policy), **fields
    )
    planner = build(options, latency_per_s=0.2, energy_per_j=0.02)
    return replay(trace, planner, footprints(), budget)


def at_rate(rate: float, ids: list[str], seed: int = 1) -> list[tuple[float, str]]:
    rng, now = Random(seed), 0.0
    return [(now := now + rng.expovariate(rate), i) for i in ids]


def drawn(weights: list[float], count: int, seed: int = 2, order: str = IDS) -> list[str]:
    return Random(seed).choices(order, weights, k=count)


SKEWED = drawn([0.5, 0.2, 0.12, 0.08, 0.06, 0.04], 800)
CHANGING = [
    i
    for phase, order in enumerate(("abcdef", "cdefab", "efabcd"))
    for i in drawn([0.4, 0.35, 0.1, 0.05, 0.05, 0.05], 300, phase, order)
]


def in_bursts(stay: float, count: int) -> list[str]:
    rng, ids = Random(4), ["a"]
    while len(ids) < count:
        ids.append(ids[-1] if rng.random() < stay else rng.choice(IDS))
    return ids


BURSTY = in_bursts(0.9, 800)


def test_lru_and_lfu_on_a_trace_done_by_hand() -> None:
    trace = [(float(n), i) for n, i in enumerate("bcdcabd")]
    # Hot at first: a b c. b and c hit, d drops a, c hits, a drops b, b drops d, d drops c.
    lru = run("lru", trace)
    assert (lru.hits, lru.swaps) == (3, 4)
    # The same until b, which now drops a (once, like d, and earlier in the file); d hits.
    lfu = run("lfu", trace)
    assert (lfu.hits, lfu.swaps) == (4, 3)


def test_static_never_moves() -> None:
    trace = at_rate(1.0, SKEWED)
    result = run("static", trace)
    assert result.swaps == 0
    assert result.hits == sum(i in "abc" for i in SKEWED)


def test_belady_on_traces_with_a_known_optimum() -> None:
    assert belady("abcabcabc", 3, "abc") == 9
    assert belady("abcd" * 3, 3, "abc") == 9  # each miss evicts the SLM that was used last
    assert belady("aXaYaZa", 1, "a", bypass=True) == 4
    assert belady("aXaYaZa", 1, "a") == 1
    assert belady("", 3) == 0


@given(st.lists(st.sampled_from(IDS), max_size=60), st.integers(1, 5))
def test_no_policy_that_loads_on_a_miss_beats_belady(ids: list[str], slots: int) -> None:
    trace = [(float(n), i) for n, i in enumerate(ids)]
    start = IDS[:slots]
    best = belady(ids, slots, start)
    assert run("lru", trace, slots).hits <= best
    assert run("lfu", trace, slots).hits <= best
    assert best <= belady(ids, slots, start, bypass=True)
    assert run("static", trace, slots).hits <= belady(ids, slots, start, bypass=True)


@given(
    st.lists(st.sampled_from(IDS), max_size=60),
    st.lists(st.integers(1, 4), min_size=6, max_size=6),
    st.integers(4, 9),
)
def test_the_bound_for_unequal_sizes_holds(ids: list[str], sizes: list[int], budget: int) -> None:
    slms = footprints(dict(zip(IDS, sizes, strict=True)))
    options = ResidencyOptions(memory_budget_bytes=budget, policy=ResidencyPolicyName.LRU)
    planner = build(options, latency_per_s=0.2, energy_per_j=0.02)
    trace = [(float(n), i) for n, i in enumerate(ids)]
    hot_first, left = [], budget
    for slm in slms:
        if slm.bytes <= left:
            hot_first.append(slm.slm_id)
            left -= slm.bytes
    result = replay(trace, planner, slms, budget)
    assert result.hits <= belady_bound(
        ids_of(trace), {s.slm_id: s.bytes for s in slms}, budget, hot_first
    )
    assert result.peak_bytes <= budget


@pytest.mark.parametrize("rate", [0.5, 4.0])
@pytest.mark.parametrize(
    ("ids", "better_by"),
    [(SKEWED, 0.02), (CHANGING, 0.01), (BURSTY, -0.01)],
    ids=["skewed", "phases that change", "bursts"],
)
def test_calm_hits_more_often_than_lru(ids: list[str], better_by: float, rate: float) -> None:
    trace = at_rate(rate, ids)
    calm, lru = run("calm", trace), run("lru", trace)
    assert calm.hit_ratio >= lru.hit_ratio + better_by
    assert calm.expired == lru.expired == 0
    assert calm.peak_bytes <= SLOTS


@pytest.mark.parametrize(
    ("ids", "better_by"),
    [(SKEWED, -0.01), (CHANGING, 0.1), (BURSTY, -0.01)],
    ids=["skewed", "phases that change", "bursts"],
)
def test_calm_follows_changes_that_lfu_misses(ids: list[str], better_by: float) -> None:
    trace = at_rate(0.5, ids)
    assert run("calm", trace).hit_ratio >= run("lfu", trace).hit_ratio + better_by


def test_calm_comes_close_to_the_optimum_where_demand_is_skewed_or_bursty() -> None:
    for ids in (SKEWED, CHANGING, BURSTY):
        best = belady(ids, SLOTS, "abc") / len(ids)
        assert run("calm", at_rate(0.5, ids)).hit_ratio >= 0.94 * best


def test_a_cycle_is_foreseen_and_beats_the_optimum_of_loading_on_a_miss() -> None:
    ids = list(IDS * 60)
    trace = [(2.0 * n, i) for n, i in enumerate(ids)]
    assert run("lru", trace).hit_ratio < 0.02
    assert run("calm", trace).hits > belady(ids, SLOTS, "abc", bypass=True)


def test_fewer_swaps_are_made_where_fewer_are_allowed() -> None:
    trace = at_rate(4.0, drawn([1.0] * 6, 400))
    minutes = trace[-1][0] / 60.0
    assert run("calm", trace, max_swaps_per_min=30).swaps <= 30 * (minutes + 1)
    assert run("lru", trace).swaps > 60 * minutes
