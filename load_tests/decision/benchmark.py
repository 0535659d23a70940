"""CPU cost of a routing decision: from the bytes of the body to the chosen SLM and its record.

One thread, no service: synthetic fleets, each with a predictor that the trainer fitted on synthetic
outcomes. All figures are measured in turn, so that other work on the machine slows all of them
alike. Reading the clock costs about 0.05 us per stage.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from random import Random
from time import perf_counter_ns
from typing import Any

import psutil
from pydantic_core import from_json

from calm_serve.config import Goals
from calm_serve.prediction import LightGBMPredictor, MetadataPrior
from calm_serve.requests import ContextBuilder, fill_features, parse_chat, parse_overrides
from calm_serve.routing import ModelSelector
from calm_serve.testing import decision_for
from calm_serve.types import Decision, RoutingContext
from load_tests.common import report
from load_tests.decision import plots
from load_tests.decision.lightgbm_calls import (
    OPTIONS,
    measure_lightgbm,
    summary,
    tree_counts,
)
from load_tests.decision.world import (
    SEED,
    World,
    body,
    make_world,
)

SLMS = (4, 8, 32)
CHARS = (20, 200, 2000, 30_000)
PATHS = ("fast", "pinned", "scored")
EXPECTED_PATHS = {"fast": "rule", "pinned": "pinned", "scored": "scored"}
STAGES = ("json", "request", "context", "features", "choice")
BODIES = 32  # different prompts per case
TURNS, REPEATS = 50, 20  # a case is measured REPEATS times in each of TURNS turns
MEMORY_DECISIONS = 10_000
KEYS = ("p50_us", "p99_us", "min_us")

Figures = dict[str, Any]
Samples = dict[str, list[int]]  # nanoseconds


class Case:
    """One path, fleet and prompt length; decides for its bodies in turn."""

    def __init__(self, path: str, selector: ModelSelector, world: World, chars: int) -> None:
        self.name = f"{path}.{len(world.fleet.slms)}.{chars}"
        self._selector = selector
        self._builder = ContextBuilder(world.fleet)
        self._by_rule = path == "fast"
        rng = Random(f"{SEED} {self.name}")
        bodies = [body(path, chars, rng, world.fleet) for _ in range(BODIES)]
        self._bodies: Iterator[bytes] = cycle(bodies)
        self._ids = 0
        for one in bodies:
            decided = self.decide(one)
            if decided.path != EXPECTED_PATHS[path] or decided.context.prompt_chars < chars:
                raise RuntimeError(f"{self.name} was decided by the path {decided.path}")

    def decide(self, raw: bytes) -> Decision:
        """A whole decision, as the router makes it."""
        self._ids += 1
        request = parse_chat(from_json(raw))
        return self._selector.decide(request, parse_overrides({}), f"{self.name}-{self._ids}")

    def context(self) -> RoutingContext:
        """The context of one of the requests."""
        return self.decide(next(self._bodies)).context

    def measure(self, samples: Samples) -> None:
        """Time one decision as a whole, then the next one stage by stage."""
        raw = next(self._bodies)
        start = perf_counter_ns()
        self.decide(raw)
        samples["total"].append(perf_counter_ns() - start)
        raw = next(self._bodies)
        self._ids += 1
        marks = [perf_counter_ns()]
        parsed = from_json(raw)
        marks.append(perf_counter_ns())
        request, overrides = parse_chat(parsed), parse_overrides({})
        marks.append(perf_counter_ns())
        context = self._builder.build(request, overrides, f"{self.name}-{self._ids}")
        marks.append(perf_counter_ns())
        if not self._by_rule:
            fill_features(context, request)
        marks.append(perf_counter_ns())
        decision_for(self._selector, context)
        marks.append(perf_counter_ns())
        for stage, (begin, end) in zip(STAGES, pairwise(marks), strict=True):
            samples[stage].append(end - begin)


def measure_decisions(cases: Sequence[Case], turns: int) -> Figures:
    """Measure all cases in turn; figures by `path.slms.chars[.stage]`."""
    samples: dict[str, Samples] = {case.name: defaultdict(list) for case in cases}
    for _ in range(turns):
        for case in cases:
            for _ in range(REPEATS):
                case.measure(samples[case.name])
    figures: Figures = {}
    for name, by_stage in samples.items():
        for stage, found in by_stage.items():
            whole = stage == "total"
            prefix = name if whole else f"{name}.{stage}"
            figures |= {f"{prefix}.{key}": value for key, value in summary(found).items()}
            if whole:
                figures[f"{name}.decisions_per_s"] = round(len(found) / sum(found) * 1e9)
    return figures


def measure_memory(case: Case, decisions: int) -> Figures:
    """Growth of memory over `decisions` decisions, once the decision log is full."""

    def run() -> tuple[int, int]:
        for _ in range(decisions):
            case.context()
        gc.collect()
        return sys.getallocatedblocks(), psutil.Process().memory_info().rss

    before, after = run(), run()
    return {
        "memory.decisions": decisions,
        "memory.more_blocks": after[0] - before[0],
        "memory.more_rss_bytes": after[1] - before[1],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests decision", description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS, help="more are steadier (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = parser.parse_args(argv)
    worlds = {slms: make_world(slms) for slms in SLMS}
    cases = []
    for world in worlds.values():
        selector = _selector(world)
        cases += [Case(path, selector, world, chars) for path in PATHS for chars in CHARS]
    figures = measure_decisions(cases, chosen.turns)
    for slms in SLMS:
        context = _case(cases, f"scored.{slms}.2000").context()
        found = measure_lightgbm(worlds[slms], context, chosen.turns * REPEATS // 2)
        figures |= {f"lightgbm.{slms}.{key}": value for key, value in found.items()}
    figures |= measure_memory(_case(cases, "scored.8.2000"), MEMORY_DECISIONS)
    config = {
        "slms": SLMS,
        "chars": CHARS,
        "samples": chosen.turns * REPEATS,
        "seed": SEED,
        "trees": {slms: tree_counts(world) for slms, world in worlds.items()},
    }
    figures = headline(figures) | figures
    _show(figures, config["trees"])
    plots.draw(report.PLOTS, figures, CHARS, PATHS, STAGES, OPTIONS)
    report.write(chosen.json, "decision", config, figures)
    return 0


def headline(figures: Figures) -> Figures:
    """The headline figures: 8 SLMs, prompts of 2,000 characters."""
    found: Figures = {}
    for path in ("fast", "scored"):
        found |= {f"{path}_{key}": figures[f"{path}.8.2000.{key}"] for key in ("p50_us", "p99_us")}
    # The more expensive path; a mix of both is in between.
    return found | {"decisions_per_s": figures["scored.8.2000.decisions_per_s"]}


def _selector(world: World) -> ModelSelector:
    return ModelSelector(
        world.fleet,
        Goals(exploration_ratio=0.0),  # an explored choice costs the same, but is another path
        read_state=lambda spec: world.states[spec.id],
        predictor=LightGBMPredictor(world.artifact, MetadataPrior()),
    )


def _case(cases: Sequence[Case], name: str) -> Case:
    return next(case for case in cases if case.name == name)


def _show(figures: Figures, trees: dict[int, dict[str, float]]) -> None:
    rows = [
        [
            path,
            str(slms),
            f"{chars:,}",
            *(f"{figures[f'{path}.{slms}.{chars}.{key}']:.0f}" for key in ("p50_us", "p99_us")),
            *(f"{figures[f'{path}.{slms}.{chars}.{stage}.p50_us']:.1f}" for stage in STAGES),
            f"{figures[f'{path}.{slms}.{chars}.decisions_per_s']:,}",
        ]
        for path in PATHS
        for slms in SLMS
        for chars in CHARS
    ]
    head = ["path", "SLMs", "chars", "p50 us", "p99 us", *(f"{s} us" for s in STAGES), "per s"]
    print(report.table(head, rows))
    options = [
        [name, str(slms), *(f"{figures[f'lightgbm.{slms}.{name}.{k}']:.1f}" for k in KEYS)]
        for slms in SLMS
        for name in OPTIONS
    ]
    print("\nLightGBM: every head for every candidate")
    print(report.table(["call", "SLMs", *(k.replace("_", " ") for k in KEYS)], options))
    for slms, counts in trees.items():
        print(f"{slms} SLMs: trees " + ", ".join(f"{k} {v:g}" for k, v in counts.items()))
    print(
        "8 SLMs, 2,000 characters: " + ", ".join(f"{k} {figures[k]:g}" for k in headline(figures))
    )
    print(
        f"memory after {figures['memory.decisions']:,} more decisions: "
        f"{figures['memory.more_blocks']:+,} objects, {figures['memory.more_rss_bytes']:+,} bytes"
    )
