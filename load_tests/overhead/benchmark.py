"""Latency that the router adds to the same vLLM engine called directly.

Three sides with equal engines run on this machine and are loaded in turn: vLLM's own OpenAI server
(`direct`), the router with the SLM pinned, and, at one request at a time, the router with
`model: auto`. A figure is the difference to `direct` within a repeat, then the median over the
repeats. The second part serves the fleet again without Serve's fast transport.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from load_tests.common import report
from load_tests.common.direct import (
    arguments,
    bare_fleet,
    direct,
    specs_of,
)
from load_tests.common.load import (
    Request,
    Run,
    closed_loop,
    median,
    percentile,
)
from load_tests.common.served import served
from load_tests.common.short_prompts import OUTPUT_TOKENS, ShortPrompts, texts
from load_tests.common.sse import Answer
from load_tests.overhead import plots

SLM = "sql"
SLMS = (SLM, "reason")  # the second gives `auto` an alternative
REQUESTS = {1: 12, 4: 32, 16: 64}  # by concurrency, of each run
REPEATS = 5
TEXTS, CANDIDATES = 100, 400
SIDES = ("direct", "pinned", "auto")
SUFFIXES = ("", "_no_fast_flags")
MEASURES = {
    "ttft_overhead_p50_ms": "ttft_p50_ms",
    "gap_overhead_p50_ms": "gap_p50_ms",
    "gap_overhead_p99_ms": "gap_p99_ms",
    "e2e_overhead_p50_ms": "e2e_p50_ms",
}

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """One load: the side, the requests at a time, streamed or not."""

    side: str
    concurrency: int
    stream: bool

    @property
    def name(self) -> str:
        """`side.c1.streamed`, as in the names of the figures."""
        return f"{self.side}.c{self.concurrency}.{'streamed' if self.stream else 'whole'}"


POINTS = [
    Point(side, concurrency, stream)
    for stream in (True, False)
    for concurrency in REQUESTS
    for side in SIDES
    if side != "auto" or concurrency == 1
]


@dataclass(slots=True)
class Measured:
    """Summaries of every run by point, with errors and the load generator's CPU time."""

    runs: dict[str, list[Figures]] = field(default_factory=lambda: defaultdict(list))
    auto_answers: Counter[str] = field(default_factory=Counter)  # `model by path` of `auto`
    errors: Counter[str] = field(default_factory=Counter)
    client_cpu_ratio: float = 0.0


def summary(answers: Sequence[Answer]) -> Figures:
    """Percentiles of one run in milliseconds."""
    gaps = [gap for a in answers for gap in a.gaps_s]
    values = {
        "ttft_p50_ms": percentile([a.ttft_s for a in answers], 0.5),
        "ttft_p99_ms": percentile([a.ttft_s for a in answers], 0.99),
        "gap_p50_ms": percentile(gaps, 0.5),
        "gap_p99_ms": percentile(gaps, 0.99),
        "e2e_p50_ms": percentile([a.e2e_s for a in answers], 0.5),
        "e2e_p99_ms": percentile([a.e2e_s for a in answers], 0.99),
    }
    return {name: 1e3 * value for name, value in values.items()}


def kept(point: Point, run: Run) -> list[Answer]:
    """Comparable answers: complete ones, and of `auto` only those of the measured SLM."""
    return [a for a in run.good if point.side != "auto" or a.slm == SLM]


def difference(runs: Mapping[str, Sequence[Figures]], point: Point, key: str) -> list[float]:
    """The point's value less that of `direct`, for every repeat."""
    base = runs[Point("direct", point.concurrency, point.stream).name]
    pairs = zip(runs[point.name], base, strict=True)
    return [own[key] - other[key] for own, other in pairs if own and other]


def figures_of(measured: Measured, suffix: str) -> Figures:
    """Medians of every point, the differences with their range, and the headline figures."""
    found: Figures = {}
    for point in POINTS:
        runs = [run for run in measured.runs[point.name] if run]
        for key in runs[0] if runs else ():
            found[f"{point.name}.{key}{suffix}"] = round(median([r[key] for r in runs]), 3)
        if point.side == "direct":
            continue
        for name, key in MEASURES.items():
            values = difference(measured.runs, point, key)
            if not values or ("gap" in name and not point.stream):
                continue
            found[f"{point.name}.{name}{suffix}"] = round(median(values), 3)
            found[f"{point.name}.{name}_range{suffix}"] = [
                round(min(values), 3),
                round(max(values), 3),
            ]
    for name in MEASURES:
        for prefix, side in (("", "pinned"), ("auto_", "auto")):
            value = found.get(f"{Point(side, 1, True).name}.{name}{suffix}")
            if value is not None:
                found[f"{prefix}{name}{suffix}"] = value
    found[f"errors{suffix}"] = measured.errors.total()
    found[f"client_cpu_ratio{suffix}"] = round(measured.client_cpu_ratio, 3)
    return found


async def routed_texts(url: str) -> list[str]:
    """Texts that `auto` sends to the measured SLM, so that all sides use the same engine.

    First come texts without an instruction. If scoring sends too few of them to the SLM, texts
    follow that name its task and are decided by a rule.
    """
    bare = texts(CANDIDATES)
    found: list[str] = []
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
        for text in (*bare, *(f"Write SQL. {one}" for one in bare)):
            body = {"model": "auto", "messages": [{"role": "user", "content": f"No. 1: {text}"}]}
            decision = (await client.post("/v1/route", json=body)).raise_for_status().json()
            if decision["slm_id"] == SLM:
                found.append(text)
            if len(found) == TEXTS:
                return found
    raise RuntimeError(f"only {len(found)} of {2 * CANDIDATES} prompts are routed to {SLM}")


async def measure(direct_url: str, our_url: str, repeats: int, label: str) -> Measured:
    """Measure every point in turn; every other repeat runs them in reverse order."""
    prompts, measured = ShortPrompts(await routed_texts(our_url)), Measured()

    def requests(point: Point, count: int) -> list[Request]:
        url = direct_url if point.side == "direct" else our_url
        model = "auto" if point.side == "auto" else SLM
        return [prompts.request(url, model, slm=SLM, stream=point.stream) for _ in range(count)]

    for point in POINTS:  # warm-up
        await closed_loop(requests(point, 2 * point.concurrency), point.concurrency)
    with tqdm(total=repeats * len(POINTS), desc=label, mininterval=1.0) as bar:
        for repeat in range(repeats):
            for point in POINTS if repeat % 2 == 0 else reversed(POINTS):
                count = REQUESTS[point.concurrency]
                run = await closed_loop(requests(point, count), point.concurrency)
                _add_run(measured, point, run)
                bar.update()
    return measured


def _add_run(measured: Measured, point: Point, run: Run) -> None:
    answers = kept(point, run)
    measured.runs[point.name].append(summary(answers) if answers else {})
    measured.errors.update(f"{point.side}: {a.error}" for a in run.answers if a.error)
    measured.client_cpu_ratio = max(measured.client_cpu_ratio, run.client_cpu_ratio)
    if point.side == "auto":
        measured.auto_answers.update(f"{a.slm} by {a.reason.partition(':')[0]}" for a in run.good)


def show(figures: Figures, suffix: str) -> None:
    """Print one part's table and headline figures."""
    rows = []
    for point in POINTS:
        cells = [
            _cell(figures, f"{point.name}.{key}{suffix}")
            for key in ("ttft_p50_ms", "gap_p50_ms", "gap_p99_ms", "e2e_p50_ms")
        ]
        added = [_cell(figures, f"{point.name}.{key}{suffix}", "+.2f") for key in MEASURES]
        kind = "streamed" if point.stream else "whole"
        rows.append([point.side, str(point.concurrency), kind, *cells, *added])
    head = ["side", "at once", "answer", "TTFT p50", "gap p50", "gap p99", "e2e p50"]
    print(f"\nms, Serve's fast transport {'off' if suffix else 'on'}; + is added to direct")
    print(report.table([*head, "+TTFT", "+gap p50", "+gap p99", "+e2e"], rows))
    print(
        f"errors {figures[f'errors{suffix}']}, load generator at most "
        f"{figures[f'client_cpu_ratio{suffix}']:.2f} of a core"
    )


def _cell(figures: Figures, name: str, style: str = ".2f") -> str:
    return format(figures[name], style) if name in figures else "-"


def main(arguments_: Sequence[str]) -> int:
    """Command line of the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests overhead", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    chosen = parser.parse_args(arguments_)
    fleet = bare_fleet(SLMS)
    spec = next(s for s in specs_of(fleet) if s.id == SLM)
    config = {
        "engine": arguments(spec),
        "output_tokens": OUTPUT_TOKENS,
        "requests_by_concurrency": REQUESTS,
        "repeats": chosen.repeats,
    }
    print(f"{SLM}: {' '.join(config['engine'][2:])}\n{config['requests_by_concurrency']} requests")
    figures: Figures = {}
    with direct([spec]) as urls:
        for suffix in SUFFIXES:
            label = "without flags" if suffix else "fast transport"
            with served(fleet, _no_exploration, plain=bool(suffix)) as url:
                measured = asyncio.run(measure(urls[SLM], url, chosen.repeats, label))
            figures |= figures_of(measured, suffix)
            show(figures, suffix)
            config[f"auto_answered_by{suffix}"] = dict(measured.auto_answers)
            config[f"error_kinds{suffix}"] = dict(measured.errors)
            print("auto was answered by", dict(measured.auto_answers), dict(measured.errors) or "")
    plots.draw(report.PLOTS, figures, list(REQUESTS))
    report.write(chosen.json, "overhead", config, figures)
    return 0


def _no_exploration(args: dict[str, Any]) -> None:
    args["goals"]["exploration_ratio"] = 0.0  # an explored choice would measure another model
