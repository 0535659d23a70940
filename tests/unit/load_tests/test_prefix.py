"""The prefix benchmark's workloads, caches, policies and simulation."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from calm_serve.replicas import FirstTokenEstimator, QueueLengths
from calm_serve.requests.context import prefix_chain
from calm_serve.testing import FakeClock
from calm_serve.types import ReplicaState
from load_tests.prefix import benchmark, live, world
from load_tests.prefix import simulation as simulation_module
from load_tests.prefix.policies import BASELINES, Policy, Prompt, makers
from load_tests.prefix.simulation import (
    BlockCache,
    Simulation,
    ceiling,
    imbalance,
)
from load_tests.prefix.world import Request, Workload

SMALL = world.chats(20, 60.0)


def workload(*prompts: tuple[int, ...], every_s: float = 10.0) -> Workload:
    requests = (
        Request(i * every_s, blocks, 10 * len(blocks), 5) for i, blocks in enumerate(prompts)
    )
    return Workload("own", 10, tuple(requests))


def chains(of: Workload) -> list[tuple[int, ...]]:
    return [prefix_chain(text) for text in world.texts(of, 8192)]


def test_the_shipped_trace_is_the_published_beginning() -> None:
    trace = world.mooncake()
    assert len(trace.requests) == 3000
    assert trace.requests[0].input_tokens == 6758
    assert trace.requests[0].blocks == tuple(range(14))
    assert all(a.at_s <= b.at_s for a, b in zip(trace.requests, trace.requests[1:], strict=False))
    assert ceiling(trace, 1 << 60) == pytest.approx(0.32, abs=0.01)
    assert (world.TRACE.parent / "LICENSE").is_file()


def test_every_turn_of_a_chat_holds_the_whole_history() -> None:
    assert world.chats(20, 60.0) == SMALL
    last: dict[str, Request] = {}
    for request in SMALL.requests:
        before = last.get(request.session)
        if before is not None:
            assert request.blocks[: len(before.blocks)] == before.blocks
            assert request.ends[: len(before.ends)] == before.ends
        assert request.ends[-1] == len(request.blocks)
        last[request.session] = request
    assert not any(a.session for a in world.without_sessions(SMALL).requests)


def test_thinning_keeps_conversations_whole() -> None:
    trace = world.mooncake()
    kept = world.thinned(trace, 0.25)
    names = {a.blocks[:2] for a in kept.requests}
    assert kept.requests == tuple(a for a in trace.requests if a.blocks[:2] in names)
    assert 0.2 < len(kept.requests) / len(trace.requests) < 0.3


def test_copies_share_the_first_block_only() -> None:
    doubled = world.copies(workload((1, 2), (1, 3)), 2, 5.0)
    assert sorted(a.blocks[0] for a in doubled.requests) == [1, 1, 1, 1]
    assert len({b for a in doubled.requests for b in a.blocks[1:]}) == 4


def test_a_smaller_and_a_faster_workload() -> None:
    small = world.scaled(workload((1, 2, 3), (1, 2), (4,)), 8, 2)
    assert [a.input_tokens for a in small.requests] == [16, 16, 8]
    fast = world.at_pace(small, 1.0, 16)
    assert [a.at_s for a in fast.requests] == [0.0, 0.5, 1.0]


def test_texts_begin_alike_as_far_as_their_blocks_do() -> None:
    first, second = chains(workload(tuple(range(1, 20)), (*range(1, 10), *range(50, 60))))
    same = sum(a == b for a, b in zip(first, second, strict=True))
    assert same == 9 * 10 * world.CHARS_PER_TOKEN // 128


def test_the_cache_counts_leading_blocks_and_forgets_tails_first() -> None:
    cache = BlockCache(3)
    assert cache.take((1, 2, 3, 4)) == 0
    assert cache.take((1, 2, 3, 4)) == 3
    assert cache.take((9, 2, 3)) == 0


def test_the_ceiling_grows_with_the_cache() -> None:
    found = [ceiling(SMALL, blocks) for blocks in (1, 50, 200, 1 << 60)]
    assert found == sorted(found)
    assert ceiling(workload((1, 2), (1, 2)), 10) == 0.5


def test_imbalance_is_the_largest_over_the_mean() -> None:
    assert imbalance([3, 1]) == 1.5
    assert imbalance([2, 2, 2]) == 1.0


def choose(policy: Policy, prompt: Prompt, queues: tuple[int, ...] = (0, 0)) -> str:
    states = [
        ReplicaState(f"r{i}", queue_length=q, max_queue_length=9) for i, q in enumerate(queues)
    ]
    return policy.choose(prompt, states)


@pytest.mark.parametrize("name", list(makers()))
def test_asking_a_policy_changes_nothing(name: str) -> None:
    (policy,) = makers()[name](1)
    clock = FakeClock()
    policy.attach(FirstTokenEstimator(100, clock), QueueLengths(clock))
    prompt = Prompt("d", (1, 2, 3), (1, 2, 3), 96, "s")
    if name not in ("power_of_two", "least_loaded", "ours"):  # these may draw
        assert choose(policy, prompt) == choose(policy, prompt)
    policy.record(prompt, "r0")


def test_the_ray_rule_follows_matches_whatever_the_load_and_else_the_smallest_tree() -> None:
    first, second = makers()["ray_prefix_rule"](2)
    first.record(Prompt("d", (), tuple(range(20)), 0), "r0")
    assert choose(second, Prompt("d", (), tuple(range(20)), 0), (8, 0)) == "r0"
    assert choose(second, Prompt("d", (), (0, *range(50, 70)), 0), (0, 8)) == "r1"


def test_round_robin_and_least_loaded() -> None:
    (robin,), (least,) = makers()["round_robin"](1), makers()["least_loaded"](1)
    prompt = Prompt("d", (1,), (1,), 32)
    one = choose(robin, prompt)
    robin.record(prompt, one)
    assert choose(robin, prompt) != one
    assert choose(least, prompt, (3, 1)) == "r1"


def test_a_simulation_repeats_itself_and_one_replica_reaches_its_ceiling() -> None:
    ours = makers()["ours"]
    simulation = Simulation(SMALL, chains(SMALL), 4, 8, 300)
    assert simulation.run(ours) == simulation.run(ours)
    alone = Simulation(SMALL, chains(SMALL), 1, 1, 300).run(ours)
    assert alone.cached_share == pytest.approx(ceiling(SMALL, 300))
    assert alone.load_imbalance == alone.agreement == 1.0


def test_prompts_are_computed_one_after_the_other() -> None:
    both = workload((1,) * 1, (2,), every_s=0.0)
    result = Simulation(both, chains(both), 1, 1, 10).run(makers()["ours"])
    assert result.ttft_p95_s == pytest.approx(2 * 10 / 12_000 + 0.02)


@pytest.mark.parametrize("routers", [1, 8])
def test_ours_is_as_good_as_the_best_baseline_on_unnamed_chats(routers: int) -> None:
    chats = world.without_sessions(world.chats(120, 300.0))
    simulation = Simulation(chats, chains(chats), 2, routers, 750)
    results = {name: simulation.run(makers()[name]) for name in ("ours", *BASELINES)}
    ours = results.pop("ours")
    assert ours.cached_share >= 0.98 * max(r.cached_share for r in results.values())
    assert ours.ttft_p95_s <= 1.02 * min(r.ttft_p95_s for r in results.values())
    assert ours.load_imbalance <= 1.15


def test_ours_knows_the_queues_of_one_router_better_than_their_lengths_do() -> None:
    trace = world.until(world.half(world.mooncake(), second=False), 250.0)
    simulation = Simulation(trace, chains(trace), 4, 1, 3125)
    ours, least = (simulation.run(makers()[name]) for name in ("ours", "least_loaded"))
    assert ours.ttft_p50_s < 0.8 * least.ttft_p50_s
    assert ours.ttft_p95_s < 0.8 * least.ttft_p95_s


def test_eight_routers_hear_of_each_others_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = world.without_sessions(world.chats(60, 150.0))
    simulation = Simulation(chats, chains(chats), 4, 8, 375)
    informed = simulation.run(makers()["ours"]).cached_share
    monkeypatch.setattr(simulation_module, "RECENT", 0)
    assert simulation.run(makers()["ours"]).cached_share < 0.9 * informed


def test_the_halves_of_a_trace_share_no_request() -> None:
    trace = world.mooncake()
    first, second = (world.half(trace, second=later) for later in (False, True))
    assert len(first.requests) + len(second.requests) == len(trace.requests)
    assert [a.blocks for a in first.requests + second.requests] == [
        a.blocks for a in trace.requests
    ]
    assert 0.0 <= second.requests[0].at_s < 10.0
    assert first.requests[-1].at_s <= 500.0


def test_figures_name_every_policy_and_the_worst_is_the_headline() -> None:
    small = benchmark.World("held_out", "chats", 2, SMALL, 300)
    figures = benchmark.simulate(small)
    named = {k.split(".")[4] for k in figures if k.count(".") == 5}
    assert named == {*makers(), "ours_to_best"}
    best = max(figures[f"held_out.chats.2.1.{name}.cached_share"] for name in BASELINES)
    ours = figures["held_out.chats.2.1.ours.cached_share"]
    assert figures["held_out.chats.2.1.ours_to_best.cached_share"] == pytest.approx(
        ours / best, abs=1e-3
    )
    figures["held_out.mooncake.2.8.ours_to_best.cached_share"] = 0.5
    figures["held_out.mooncake.2.8.ours.load_imbalance"] = 3.0
    found = benchmark.headline(figures)
    assert found["held_out_8_routers_worst_hits_to_best"] == 0.5
    assert found["held_out_8_routers_worst_load_imbalance"] == 3.0
    assert found["held_out_1_routers_worst_load_imbalance"] < 3.0
    assert not any(key.startswith("fitted") or key == "hit_share_of_ceiling" for key in found)


@pytest.mark.parametrize("part", ["fitted", "held_out"])
def test_the_parts_of_the_data_have_the_same_workloads(part: str) -> None:
    found = list(benchmark.worlds(part, [2]))
    assert [w.kind for w in found] == list(benchmark.KINDS)
    assert {w.part for w in found} == {part}


@pytest.fixture
def writer(tmp_path: Path) -> live.Writer:
    words = {word: i for i, word in enumerate(("one", "two", "three", " ", "[UNK]", "user"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    return live.Writer(tmp_path)


def test_blocks_of_text_have_the_tokens_they_say(writer: live.Writer) -> None:
    assert len(writer.tokenizer.encode(writer.block(7, 64)).ids) == 64
    assert writer.block(7, 64) == writer.block(7, 64) != writer.block(8, 64)
    one = writer.messages(Request(0.0, (1, 2, 3), 0, 0), 64)
    assert [m["role"] for m in one] == ["user"]
    several = writer.messages(Request(0.0, (1, 2, 3), 0, 0, "s", (1, 2, 3)), 64)
    assert [m["role"] for m in several] == ["system", "user", "assistant"]
    assert "".join(m["content"] for m in several) == one[0]["content"]
    tokens, blocks = writer.kv_blocks(one)
    assert (tokens, len(blocks)) == (194, 6)
    longer = writer.kv_blocks(writer.messages(Request(0.0, (1, 2, 3, 4), 0, 0), 64))[1]
    assert longer[:6] == blocks


def test_the_served_ceiling_leaves_the_last_token_to_the_engine() -> None:
    prompts = [(64, (1, 2)), (64, (1, 2))]
    assert live.cached_ceiling(prompts, 10) == 32 / 128


def test_the_served_figures_come_from_the_rows() -> None:
    rows = [
        live.Row("a", 100, 0, 10, 0.2),
        live.Row("a", 100, 80, 10, 0.1),
        live.Row("b", 100, 40, 10, 0.3),
    ]
    requests = [("chats", SMALL.requests[0], None)] * 2 + [("mooncake", SMALL.requests[0], None)]
    found = live.summary(requests, rows, {"pooled_ceiling": 0.5})
    assert found["cached_share"] == 0.4
    assert found["hit_share_of_ceiling"] == 0.8
    assert found["load_imbalance"] == pytest.approx(140 / 105, abs=1e-4)
    assert found["ttft_p50_ms"] == 200.0
    assert (found["chats.cached_share"], found["mooncake.cached_share"]) == (0.4, 0.4)


def test_the_served_workloads_fit_the_model() -> None:
    for one in live.workloads().values():
        assert one.requests[-1].at_s == pytest.approx(live.DURATION_S)
        assert max(a.input_tokens for a in one.requests) <= live.MAX_PROMPT_TOKENS
