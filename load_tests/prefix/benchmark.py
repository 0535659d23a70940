"""Share of prompt tokens served from the replicas' prefix caches, and load balance.

Two parts. Simulated: 2 to 64 replicas with LRU caches and queues, 1 and 8 router processes, the
production ranking and its baselines. Served (`live`): one SLM with two replicas, each policy as a
request router of Serve, cached tokens as the engine counts them. The workloads are the Mooncake
conversation trace and generated chats (`world`).

The ceiling at a cache size is one LRU cache as large as all replicas' together. Load is work:
prompt tokens computed plus tokens generated; imbalance is its maximum over its mean. Agreement is
the share of requests for which another router process, with its own view at that moment, would have
chosen the same replica.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calm_serve.requests import BLOCK_CHARS, MAX_BLOCKS, prefix_chain
from deployments.router.live_state import MAX_BLOCKS as INDEX_BLOCKS
from load_tests.common import report
from load_tests.prefix import live, plots
from load_tests.prefix.policies import makers
from load_tests.prefix.simulation import (
    PREFILL_TOKENS_PER_S,
    TPOT_S,
    Simulation,
    ceiling,
)
from load_tests.prefix.world import (
    Workload,
    chats,
    copies,
    mooncake,
    texts,
    thinned,
    until,
    without_sessions,
)

SIZES = (2, 4, 16, 64)
ROUTERS = (1, 8)
BASELINE_SIZES = (2, 4)  # the baselines are simulated at these sizes only
TRACE_REPLICAS = 4  # replicas per copy of the trace at its own pace
COPY_OFFSET_S = 60.0
LARGE, LARGE_PART = 64, 1 / 3  # from this many replicas on, only this part of the time is simulated
TRACE_CACHE_TOKENS = 1_600_000  # per replica
CHATS_PER_REPLICA, CHATS_S = 60, 300.0
CHAT_CACHE_TOKENS = 24_000
UNBOUNDED = 1 << 60
KINDS = ("mooncake", "chats", "unnamed", "one_system_prompt")
MEASURES = (
    "cached_share",
    "share_of_ceiling",
    "load_imbalance",
    "request_imbalance",
    "ttft_p50_s",
    "ttft_p95_s",
    "agreement",
)

Figures = dict[str, Any]


@dataclass(frozen=True)
class World:
    """One workload for one number of replicas, with the cache size of each."""

    kind: str
    replicas: int
    workload: Workload
    cache_blocks: int


def worlds(sizes: Sequence[int]) -> Iterator[World]:
    """Every workload at every size, with the same load per replica."""
    trace = mooncake()
    for n in sizes:
        time = LARGE_PART if n >= LARGE else 1.0
        part = thinned(trace, n / TRACE_REPLICAS) if n < TRACE_REPLICAS else trace
        part = until(part, time * part.requests[-1].at_s)
        load = copies(part, max(1, n // TRACE_REPLICAS), COPY_OFFSET_S)
        yield World("mooncake", n, load, TRACE_CACHE_TOKENS // load.block_tokens)
        named = chats(round(CHATS_PER_REPLICA * n * time), CHATS_S * time)
        cache = CHAT_CACHE_TOKENS // named.block_tokens
        yield World("chats", n, named, cache)
        yield World("unnamed", n, without_sessions(named), cache)
        one = chats(round(CHATS_PER_REPLICA * n * time), CHATS_S * time, systems_count=1)
        yield World("one_system_prompt", n, without_sessions(one), cache)


def simulate(world: World, baselines: bool) -> Figures:
    """Figures of one world by `kind.replicas.routers.policy.measure`."""
    workload, n = world.workload, world.replicas
    name = f"{world.kind}.{n}"
    pooled = ceiling(workload, world.cache_blocks * n)
    figures: Figures = {
        f"{name}.requests": len(workload.requests),
        f"{name}.infinite_ceiling": round(ceiling(workload, UNBOUNDED), 4),
        f"{name}.pooled_ceiling": round(pooled, 4),
    }
    chains = [prefix_chain(text) for text in texts(workload, BLOCK_CHARS * MAX_BLOCKS)]
    for policy, make in makers(INDEX_BLOCKS).items():
        if policy != "ours" and not baselines:
            continue
        for routers in ROUTERS:
            result = Simulation(workload, chains, n, routers, world.cache_blocks).run(make)
            key = f"{name}.{routers}.{policy}"
            figures |= {f"{key}.{k}": round(v, 4) for k, v in asdict(result).items()}
            figures[f"{key}.share_of_ceiling"] = round(result.cached_share / pooled, 4)
    return figures


def headline(figures: Figures) -> Figures:
    """The headline figures: the worst of the cases that the targets are about."""
    few = [(kind, n) for kind in KINDS for n in BASELINE_SIZES]
    keys = [f"{kind}.{n}.1.ours" for kind, n in few]
    load = [f"{kind}.64.8.ours" for kind in KINDS]
    found = {
        "simulated_hit_share_of_ceiling": min(figures[f"{k}.share_of_ceiling"] for k in keys),
        "simulated_load_imbalance": max(figures[f"{k}.load_imbalance"] for k in keys),
        "simulated_64_hit_share_of_ceiling": min(figures[f"{k}.share_of_ceiling"] for k in load),
        "simulated_64_load_imbalance": max(figures[f"{k}.load_imbalance"] for k in load),
        "router_agreement": min(figures[f"{k}.agreement"] for k in load),
    }
    if "live.ours.hit_share_of_ceiling" in figures:
        found |= {
            "hit_share_of_ceiling": figures["live.ours.hit_share_of_ceiling"],
            "load_imbalance": figures["live.ours.load_imbalance"],
        }
    return found


def main(arguments: Sequence[str]) -> int:
    """Command line of the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests prefix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--simulated", action="store_true", help="without the served part")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, default=report.PLOTS, help="folder of the pictures")
    chosen = parser.parse_args(arguments)
    figures: Figures = {}
    for world in worlds(SIZES):
        found = simulate(world, world.replicas in BASELINE_SIZES)
        show_simulated(world, found)
        figures |= found
    plots.draw_simulated(chosen.plots, figures, list(makers(1)), SIZES)
    config: dict[str, Any] = {"simulated": _config()}
    if not chosen.simulated:
        config["live"], served = live.run()
        figures |= served
        show_live(config["live"], served)
        plots.draw_live(chosen.plots, figures, list(live.ROUTERS))
    figures = headline(figures) | figures
    print("\n" + "\n".join(f"{k:<36}{v:.3f}" for k, v in headline(figures).items()))
    report.write(chosen.json, "prefix", config, figures)
    return 0


def show_simulated(world: World, figures: Figures) -> None:
    """Print one world's table."""
    name = f"{world.kind}.{world.replicas}"
    print(
        f"\n{world.kind}, {world.replicas} replicas, {figures[f'{name}.requests']:,} requests; "
        f"ceilings: infinite cache {figures[f'{name}.infinite_ceiling']:.3f}, "
        f"pooled cache of this size {figures[f'{name}.pooled_ceiling']:.3f}"
    )
    rows = []
    for key in (k.removesuffix(".cached_share") for k in figures if k.endswith(".cached_share")):
        _, _, routers, policy = key.split(".")
        values = [f"{figures[f'{key}.{measure}']:.3f}" for measure in MEASURES]
        rows.append([policy.replace("_", " "), routers, *values])
    head = ["policy", "routers", *(m.replace("_", " ") for m in MEASURES)]
    print(report.table(head, rows))


def show_live(config: dict[str, Any], figures: Figures) -> None:
    """Print the served part's table."""
    print(
        f"\nserved: {config['requests']} requests, {config['replicas']} replicas, ceilings: "
        f"infinite cache {figures['live.infinite_ceiling']:.3f}, pooled cache of this size "
        f"{figures['live.pooled_ceiling']:.3f}"
    )
    keys = [k.removeprefix("live.ours.") for k in figures if k.startswith("live.ours.")]
    rows = [
        [policy.replace("_", " "), *(f"{figures[f'live.{policy}.{k}']:.3f}" for k in keys)]
        for policy in live.ROUTERS
    ]
    print(report.table(["policy", *(k.replace("_", " ") for k in keys)], rows))
    print(config["ray_prefix_router"])


def _config() -> dict[str, Any]:
    return {
        "sizes": SIZES,
        "routers": ROUTERS,
        "trace_factor": 1.0,  # lengths and times are the trace's own
        "trace_cache_tokens_per_replica": TRACE_CACHE_TOKENS,
        "part_of_the_time_from_64_replicas": LARGE_PART,
        "replicas_per_copy_of_the_trace": TRACE_REPLICAS,
        "chats_per_replica": CHATS_PER_REPLICA,
        "chats_begin_within_s": CHATS_S,
        "chat_cache_tokens_per_replica": CHAT_CACHE_TOKENS,
        "prefill_tokens_per_s": PREFILL_TOKENS_PER_S,
        "tpot_s": TPOT_S,
    }
