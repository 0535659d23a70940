"""Share of prompt tokens served from the replicas' prefix caches, and load balance.

Two parts. Simulated: 2 to 64 replicas with LRU caches and queues, 1 and 8 router processes, the
production ranking and its baselines. Served (`live`): one SLM with two replicas, each policy as a
request router of Serve, cached tokens as the engine counts them. The workloads are the Mooncake
conversation trace and generated chats (`world`).

Two parts of the data: constants of the ranking are fitted on `fitted` (the first half of the trace,
chats of seed 1), what is reported is `held_out` (the second half, chats of another seed).

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
from load_tests.common import report
from load_tests.prefix import live, plots
from load_tests.prefix.policies import BASELINES, makers
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
    half,
    mooncake,
    texts,
    thinned,
    until,
    without_sessions,
)

SIZES = (2, 4, 16, 64)
ROUTERS = (1, 8)
TRACE_REPLICAS = 4  # replicas per copy of the trace at its own pace
COPY_OFFSET_S = 60.0
# From this many replicas on, only so much of the trace and this part of the chats is simulated.
LARGE, LARGE_TRACE_S, LARGE_PART = 64, 330.0, 1 / 3
TRACE_CACHE_TOKENS = 1_600_000  # per replica
CHATS_PER_REPLICA, CHATS_S = 60, 300.0
CHAT_CACHE_TOKENS = 24_000
CHAT_SEEDS = {"fitted": 1, "held_out": 11}
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

    part: str  # "fitted" or "held_out"
    kind: str
    replicas: int
    workload: Workload
    cache_blocks: int

    @property
    def name(self) -> str:
        """The beginning of its figures' keys."""
        return f"{self.part}.{self.kind}.{self.replicas}"


def worlds(part: str, sizes: Sequence[int]) -> Iterator[World]:
    """Every workload of one part of the data at every size, with the same load per replica."""
    trace = half(mooncake(), second=part == "held_out")
    seed = CHAT_SEEDS[part]
    for n in sizes:
        one = thinned(trace, n / TRACE_REPLICAS) if n < TRACE_REPLICAS else trace
        load = copies(
            until(one, LARGE_TRACE_S) if n >= LARGE else one,
            max(1, n // TRACE_REPLICAS),
            COPY_OFFSET_S,
        )
        yield World(part, "mooncake", n, load, TRACE_CACHE_TOKENS // load.block_tokens)
        time = LARGE_PART if n >= LARGE else 1.0
        count, duration_s = round(CHATS_PER_REPLICA * n * time), CHATS_S * time
        named = chats(count, duration_s, seed)
        cache = CHAT_CACHE_TOKENS // named.block_tokens
        yield World(part, "chats", n, named, cache)
        yield World(part, "unnamed", n, without_sessions(named), cache)
        same = chats(count, duration_s, seed, systems_count=1)
        yield World(part, "one_system_prompt", n, without_sessions(same), cache)


def simulate(world: World) -> Figures:
    """Figures of one world by `part.kind.replicas.routers.policy.measure`."""
    workload, n = world.workload, world.replicas
    pooled = ceiling(workload, world.cache_blocks * n)
    figures: Figures = {
        f"{world.name}.requests": len(workload.requests),
        f"{world.name}.infinite_ceiling": round(ceiling(workload, UNBOUNDED), 4),
        f"{world.name}.pooled_ceiling": round(pooled, 4),
    }
    chains = [prefix_chain(text) for text in texts(workload, BLOCK_CHARS * MAX_BLOCKS)]
    for routers in ROUTERS:
        for policy, make in makers().items():
            result = Simulation(workload, chains, n, routers, world.cache_blocks).run(make)
            key = f"{world.name}.{routers}.{policy}"
            figures |= {f"{key}.{k}": round(v, 4) for k, v in asdict(result).items()}
            figures[f"{key}.share_of_ceiling"] = round(result.cached_share / pooled, 4)
        figures |= against_best(figures, f"{world.name}.{routers}")
    return figures


def against_best(figures: Figures, name: str) -> Figures:
    """Ours over the best of `BASELINES`, for each measure by itself: 1 is as good as the best."""
    found = {}
    for measure, best in (("cached_share", max), ("ttft_p50_s", min), ("ttft_p95_s", min)):
        value = best(figures[f"{name}.{policy}.{measure}"] for policy in BASELINES)
        found[f"{name}.ours_to_best.{measure}"] = round(
            figures[f"{name}.ours.{measure}"] / value, 4
        )
    return found


def headline(figures: Figures) -> Figures:
    """The headline figures: the worst over all workloads and sizes, by the number of routers."""
    found: Figures = {}
    for part in CHAT_SEEDS:
        for routers in ROUTERS:
            ours = [
                k for k in figures if k.startswith(f"{part}.") and k.split(".")[3] == f"{routers}"
            ]
            for key, end, worst in (
                ("hits_to_best", "ours_to_best.cached_share", min),
                ("ttft_p50_to_best", "ours_to_best.ttft_p50_s", max),
                ("ttft_p95_to_best", "ours_to_best.ttft_p95_s", max),
                ("load_imbalance", ".ours.load_imbalance", max),
            ):
                values = [figures[k] for k in ours if k.endswith(end)]
                if values:
                    found[f"{part}_{routers}_routers_worst_{key}"] = worst(values)
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
    parser.add_argument(
        "--part", nargs="+", choices=CHAT_SEEDS, default=["held_out"], help="of the data"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="numbers of replicas")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, default=report.PLOTS, help="folder of the pictures")
    chosen = parser.parse_args(arguments)
    figures: Figures = {}
    for part in chosen.part:
        for world in worlds(part, chosen.sizes):
            found = simulate(world)
            show_simulated(world, found)
            figures |= found
    if "held_out" in chosen.part and 4 in chosen.sizes:
        plots.draw_simulated(chosen.plots, figures, list(makers()), chosen.sizes)
    config: dict[str, Any] = {"simulated": _config()}
    if not chosen.simulated:
        config["live"], served = live.run()
        figures |= served
        show_live(config["live"], served)
        plots.draw_live(chosen.plots, figures, list(live.ROUTERS))
    figures = headline(figures) | figures
    print("\n" + "\n".join(f"{k:<48}{v:.3f}" for k, v in headline(figures).items()))
    report.write(chosen.json, "prefix", config, figures)
    return 0


def show_simulated(world: World, figures: Figures) -> None:
    """Print one world's table."""
    name = world.name
    print(
        f"\n{world.part}, {world.kind}, {world.replicas} replicas, "
        f"{figures[f'{name}.requests']:,} requests; "
        f"ceilings: infinite cache {figures[f'{name}.infinite_ceiling']:.3f}, "
        f"pooled cache of this size {figures[f'{name}.pooled_ceiling']:.3f}"
    )
    rows = []
    for key in (k.removesuffix(".agreement") for k in figures if k.endswith(".agreement")):
        *_, routers, policy = key.split(".")
        values = [f"{figures[f'{key}.{measure}']:.3f}" for measure in MEASURES]
        rows.append([policy.replace("_", " "), routers, *values])
    head = ["policy", "routers", *(m.replace("_", " ") for m in MEASURES)]
    print(report.table(head, rows))
    for processes in ROUTERS:
        start = f"{name}.{processes}.ours_to_best."
        ratios = {k.removeprefix(start): v for k, v in figures.items() if k.startswith(start)}
        text = ", ".join(f"{measure} {ratio:.3f}" for measure, ratio in ratios.items())
        print(f"ours over the best of the baselines, {processes} routers: {text}")


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
        "trace_s_from_64_replicas": LARGE_TRACE_S,
        "part_of_the_chats_from_64_replicas": LARGE_PART,
        "chat_seeds": CHAT_SEEDS,
        "trace_halves": {"fitted": "first", "held_out": "second"},
        "baselines": BASELINES,
        "replicas_per_copy_of_the_trace": TRACE_REPLICAS,
        "chats_per_replica": CHATS_PER_REPLICA,
        "chats_begin_within_s": CHATS_S,
        "chat_cache_tokens_per_replica": CHAT_CACHE_TOKENS,
        "prefill_tokens_per_s": PREFILL_TOKENS_PER_S,
        "tpot_s": TPOT_S,
    }
