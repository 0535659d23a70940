"""The decision core at scale, on simulated time: cost, state, and the effect of a stale load view.

The router's own code decides and chooses replicas; replicas are simulated engines with a queue. 10
to 100,000 requests per second are offered to 4 to 1,000 replicas, whose speed is set so that they
are 70 % busy. Costs are CPU time of the measuring thread, so that other processes are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from load_tests.common import report
from load_tests.decision.world import SEED, make_world
from load_tests.scale import plots, staleness
from load_tests.scale.curves import (
    CHECKPOINTS,
    OFFERED,
    REPLICAS,
    RPS_PER_ROUTER,
    SEEN_REPLICAS,
    SEEN_SLMS,
    UTILISATION,
    Figures,
    exponent,
    measure_candidates,
    measure_offered,
    measure_replicas,
    measure_seen,
)
from load_tests.scale.simulation import SLOTS
from load_tests.scale.staleness import (
    REQUESTS,
    Setting,
    measure_staleness,
    settings,
)
from load_tests.scale.state import slow_actor_rows

SLMS = (4, 8, 16, 32)
SEEN = 200_000
CANDIDATE_TURNS, REPLICA_TURNS = 1_000, 100
PARTS = ("decision_log", "live_view", "windows", "metrics", "outcomes")  # in figures' names


def measure(seen: int) -> Figures:
    """All figures; `seen` requests pass through the router process whose state is measured."""
    worlds = {n: make_world(n) for n in tqdm(SLMS, desc="predictors", unit="fleet")}
    figures = measure_offered(worlds, SEED)
    figures |= measure_candidates(worlds, CANDIDATE_TURNS, SEED)
    figures |= measure_replicas(REPLICA_TURNS, SEED)
    with tempfile.TemporaryDirectory() as folder:
        figures |= asyncio.run(measure_seen(worlds[SEEN_SLMS], seen, SEED, Path(folder)))
        figures["outcomes_rows_slow_actor"] = asyncio.run(slow_actor_rows(Path(folder)))
    figures |= measure_staleness(REQUESTS, SEED)
    return figures | conclusions(figures)


def conclusions(figures: Figures) -> Figures:
    """One number for the shape of every curve."""
    last, middle = CHECKPOINTS, CHECKPOINTS // 2
    found: Figures = {
        f"decision_{key}_at_100000_rps": figures[f"offered.100000.decide.{key}"]
        for key in ("p50_us", "p99_us")
    }
    for name, stage in (("cost", "decide"), ("choose", "choose")):
        seen = [figures[f"seen.{tenth}.{stage}.p50_us"] for tenth in (1, last)]
        found[f"requests_seen_{name}_ratio"] = round(seen[1] / seen[0], 3)
    found["candidates_exponent"] = exponent(SLMS, [figures[f"candidates.{n}.p50_us"] for n in SLMS])
    for case in ("new", "shared"):
        costs = [figures[f"replicas.{n}.{case}.p50_us"] for n in REPLICAS]
        found[f"replicas_exponent_{case}"] = exponent(REPLICAS, costs)
        # With few replicas, the fixed cost of a choice hides the slope.
        found[f"replicas_exponent_{case}_tail"] = exponent(REPLICAS[-2:], costs[-2:])
    found["replicas_exponent"] = max(
        found[f"replicas_exponent_{case}_tail"] for case in ("new", "shared")
    )
    found["state_bytes"] = figures[f"seen.{last}.state_bytes"]
    found["state_growth_ratio"] = round(
        figures[f"seen.{last}.state_bytes"] / figures[f"seen.{middle}.state_bytes"], 3
    )
    fresh = figures[f"{Setting('live_view').name}.p99_wait_ms"]
    for prefix, policy in (("staleness", "live_view"), ("staleness_reports", "reports")):
        old = figures[f"{Setting(policy, 1.0, 8).name}.p99_wait_ms"]
        found[f"{prefix}_p99_wait_ratio_1s"] = round(old / max(fresh, 1.0), 3)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests scale", description=__doc__)
    parser.add_argument(
        "--seen", type=int, default=SEEN, help="requests through one router (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = parser.parse_args(argv)
    figures = measure(chosen.seen)
    config = {
        "seed": SEED,
        "offered_rps": {r: {"slms": n, "replicas": k} for r, (n, k) in OFFERED.items()},
        "utilisation": UTILISATION,
        "slots_per_replica": SLOTS,
        "rps_per_router": RPS_PER_ROUTER,
        "seen": {"requests": chosen.seen, "slms": SEEN_SLMS, "replicas": SEEN_REPLICAS},
    }
    _show_cost(figures)
    _show_state(figures, chosen.seen)
    _show_staleness(figures)
    for name in conclusions(figures):
        print(f"{name:<36}{figures[name]:>14,}")
    plots.draw(report.PLOTS, figures, SLMS, chosen.seen, PARTS)
    report.write(chosen.json, "scale", config, figures)
    return 0


def _show_cost(figures: Figures) -> None:
    offered = [
        [
            f"{rate:,}",
            *map(str, OFFERED[rate]),
            str(figures[f"offered.{rate}.routers"]),
            *(
                f"{figures[f'offered.{rate}.{stage}.{key}_us']:.0f}"
                for stage in ("decide", "choose")
                for key in ("p50", "p99")
            ),
            f"{figures[f'offered.{rate}.router_cores']:.2f}",
            f"{figures[f'offered.{rate}.service_ms']:,.0f}",
            f"{figures[f'offered.{rate}.p99_wait_ratio']:.2f}",
            f"{figures[f'offered.{rate}.sent_to_full_share']:.1%}",
        ]
        for rate in OFFERED
    ]
    head = ["requests/s", "SLMs", "replicas", "routers", "decide p50 us", "p99", "choose p50 us"]
    head += ["p99", "router cores", "service ms", "p99 wait / service", "sent to full"]
    print(report.table(head, offered))
    for name, sizes in (("candidates", SLMS), ("replicas.{}.new", REPLICAS)):
        pattern = name if "{}" in name else name + ".{}"
        print(f"\n{name.partition('.')[0]}: CPU us, median and 99th percentile")
        rows = [
            [str(n), *(f"{figures[f'{pattern.format(n)}.{k}_us']:.0f}" for k in ("p50", "p99"))]
            for n in sizes
        ]
        print(report.table(["count", "p50", "p99"], rows))
    print("\nreplicas, with the prompt's prefix cached by all of them: CPU us")
    shared = [
        [str(n), *(f"{figures[f'replicas.{n}.shared.{k}_us']:.0f}" for k in ("p50", "p99"))]
        for n in REPLICAS
    ]
    print(report.table(["count", "p50", "p99"], shared))


def _show_state(figures: Figures, seen: int) -> None:
    print(
        f"\none router process, {SEEN_SLMS} SLMs, {SEEN_REPLICAS} replicas: cost, and KiB of state"
    )
    rows = [
        [
            f"{seen * tenth // CHECKPOINTS:,}",
            *(f"{figures[f'seen.{tenth}.decide.{key}_us']:.0f}" for key in ("p50", "p99")),
            f"{figures[f'seen.{tenth}.choose.p50_us']:.0f}",
            *(f"{figures[f'seen.{tenth}.{part}_bytes'] / 1024:,.0f}" for part in PARTS),
        ]
        for tenth in range(1, CHECKPOINTS + 1)
    ]
    head = ["requests seen", "decide p50 us", "p99", "choose p50 us"]
    print(report.table([*head, *(part.replace("_", " ") for part in PARTS)], rows))
    print(f"prefix blocks per SLM: {figures['seen.prefix_blocks']}")
    print(
        "outcomes in memory while they come twice as fast as they are acknowledged: "
        f"{figures['outcomes_rows_slow_actor']:,} rows at most"
    )


def _show_staleness(figures: Figures) -> None:
    print(
        f"\nstale load views: one SLM, {staleness.REPLICAS} replicas of "
        f"{staleness.SLOTS} slots, {staleness.UTILISATION:.0%} busy, "
        f"service {staleness.SERVICE_S:g} s"
    )
    keys = ("p99_wait_ms", "mean_wait_ms", "waiting_share", "sent_to_full_share", "max_over_mean")
    rows = [
        [
            s.policy,
            str(s.routers),
            f"{s.age_s:g}" if s.policy in ("live_view", "reports") else "",
            *(f"{figures[f'{s.name}.{key}']:,}" for key in keys),
        ]
        for s in settings()
    ]
    print(report.table(["view", "routers", "age s", *(k.replace("_", " ") for k in keys)], rows))
    print()
