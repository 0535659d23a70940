"""The simulated part of the `paper` experiment: the real core, simulated engines, real answers.

`world` lists what is real and what is simulated, `answers` where answers and speeds come from. Each
point is run with several seeds, from which arrivals and requests are drawn; figures are means over
the seeds with a 95 % interval (Student's t). Equal seeds give equal figures.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from load_tests.common import arrivals, report, termination
from load_tests.paper.simulated import adaptation, cold_start, hours, plots, residency, scenarios
from load_tests.paper.simulated.answers import (
    CONCURRENCY,
    Answers,
    published,
    reference,
)
from load_tests.paper.simulated.scenarios import (
    LARGEST,
    ORACLE,
    OURS,
    PAPER,
    PLAIN,
    SHARES,
    THRIFTY,
    Figures,
)

POLICIES = (OURS, THRIFTY, PAPER, LARGEST, "single", SHARES, *PLAIN, ORACLE)
PUBLISHED_POLICIES = (OURS, THRIFTY, PAPER, LARGEST, SHARES, "least_loaded", ORACLE)
CROWD_POLICIES = (OURS, "least_loaded", PAPER, LARGEST)
LOADS = (0.05, 0.2, 0.8)  # beside BUSY_RATIO
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
WORKERS = 2
# Pairs of policies that are compared, and the prefix of their figures' names.
COMPARED = (
    (OURS, LARGEST, ""),
    (OURS, PAPER, "paper_policy_"),
    (THRIFTY, LARGEST, "thrifty_"),
    (THRIFTY, PAPER, "thrifty_paper_policy_"),
)
TARGETS = (
    "residency_hit_rate",
    "residency_hit_ratio_belady",
    "goal_recovery_requests",
    "new_slm_adoption_requests",
    "broken_slm_drain_requests",
)


@dataclass(frozen=True)
class Sizes:
    """Amount of simulation."""

    seeds: int = 5
    requests: int = 1500  # of each policy at each point
    hours: float = 1000.0  # SLM-hours of the long run
    hours_requests: int = 60_000


@dataclass(frozen=True)
class Job:
    """One seed of one scenario; `prefix` precedes the names of its figures."""

    prefix: str
    run: functools.partial[Figures]
    fleet: str = "reference"

    @property
    def part(self) -> str:
        """The name under which its minutes are reported."""
        return self.prefix.rstrip(".") or str(self.run.func.__name__)


def jobs_of(sizes: Sizes, trace: Sequence[float]) -> list[Job]:
    """All jobs, the longest first."""
    slm_hours = functools.partial(
        hours.slm_hours, seed=1, hours=sizes.hours, requests=sizes.hours_requests
    )
    found = [Job("", slm_hours)]
    for seed in range(1, sizes.seeds + 1):
        found += _policy_jobs(seed, sizes.requests, trace)
        found.append(Job("", functools.partial(residency.traces, seed=seed)))
        crowd = functools.partial(scenarios.flash_crowd, seed=seed, policies=CROWD_POLICIES)
        found.append(Job("", crowd))
        for name in adaptation.SHIFTS:
            shift = functools.partial(adaptation.goal_recovery, seed=seed, name=name)
            found.append(Job("", shift))
        for kind in adaptation.BREAKS:
            found.append(Job("", functools.partial(adaptation.broken_slm, seed=seed, kind=kind)))
        for slm in cold_start.NEW_SLMS:
            new = functools.partial(cold_start.new_slm, seed=seed, slm_id=slm)
            found.append(Job("", new))
    return found


def _policy_jobs(seed: int, requests: int, trace: Sequence[float]) -> list[Job]:
    def job(name: str, kind: str, memory: bool, policies: Sequence[str], load: float) -> Job:
        fleet = "published" if name.startswith("published") else "reference"
        run = functools.partial(
            scenarios.policies_on,
            kind=kind,
            count=requests,
            seed=seed,
            trace=tuple(trace) if kind == "azure" else (),
            memory=memory,
            policies=tuple(policies),
            load=load,
        )
        return Job(f"{name}.", run, fleet)

    usual = scenarios.BUSY_RATIO
    found = [
        job("hot", "fifa", False, POLICIES, usual),
        job("half_memory", "fifa", True, POLICIES, usual),
        job("published", "fifa", False, PUBLISHED_POLICIES, usual),
        job("published_half_memory", "fifa", True, PUBLISHED_POLICIES, usual),
    ]
    if trace:
        found.append(job("azure", "azure", False, POLICIES, usual))
        found.append(job("azure_half_memory", "azure", True, POLICIES, usual))
    for load in LOADS:
        found.append(job(f"load_{load:g}", "fifa", False, (OURS, THRIFTY, PAPER, LARGEST), load))
    return found


_FLEETS: dict[str, Answers] = {}


def _load() -> None:
    logging.disable(logging.WARNING)  # alarms about SLMs that are broken on purpose
    _FLEETS["reference"] = reference()
    _FLEETS["published"] = published(_FLEETS["reference"])


def _run(job: Job) -> tuple[Figures, float]:
    started = time.monotonic()
    figures = job.run(_FLEETS[job.fleet])
    return {f"{job.prefix}{k}": v for k, v in figures.items()}, time.monotonic() - started


def simulate(sizes: Sizes, trace: Sequence[float], workers: int = WORKERS) -> dict[str, Any]:
    """All figures: means over seeds, with `_ci95` where there is more than one."""
    jobs = jobs_of(sizes, trace)
    results: dict[int, Figures] = {}
    minutes = Counter[str]()
    with closing(termination.in_processes(_run, jobs, workers=workers, initializer=_load)) as done:
        for place, (found, seconds) in tqdm(
            done, total=len(jobs), desc="simulate", mininterval=1.0
        ):
            results[place] = found
            minutes[jobs[place].part] += seconds / 60.0
    print("minutes of one core:", ", ".join(f"{k} {v:.1f}" for k, v in minutes.most_common()))
    values: dict[str, list[float]] = {}
    for place in range(len(jobs)):  # in order, so that sums do not depend on which ended first
        for name, value in results[place].items():
            values.setdefault(name, []).append(value)
    figures = summarised(values)
    return figures | conclusions(figures, values)


def summarised(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The mean of each figure over seeds, and its `_ci95`."""
    found: dict[str, Any] = {}
    for name, each in values.items():
        found[name] = round(float(np.mean(each)), 4)
        if len(each) > 1:
            found[f"{name}_ci95"] = interval(each)
    return found


def interval(each: Sequence[float]) -> list[float]:
    """The 95 % interval of a mean of few values, by Student's t."""
    count = len(each)
    factor = T95.get(count - 1, 1.96)
    half = factor * float(np.std(each, ddof=1)) / count**0.5
    middle = float(np.mean(each))
    return [round(middle - half, 4), round(middle + half, 4)]


def conclusions(
    figures: Mapping[str, Any], values: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Comparisons of policies at every point, and the figures that have targets."""
    found: dict[str, Any] = {}

    def paired(name: str, ours: str, other: str, combine: Callable[[float, float], float]) -> None:
        pairs = zip(values[ours], values[other], strict=True)
        each = [combine(a, b) for a, b in pairs]
        found[name] = round(float(np.mean(each)), 4)
        if len(each) > 1:
            found[f"{name}_ci95"] = interval(each)

    for point in points(figures):
        for us, other, prefix in COMPARED:
            name = f"{point}.{prefix}"
            for measure, key in (("latency", "latency_s"), ("energy", "energy_j")):
                ours, its = f"{point}.{us}.{key}", f"{point}.{other}.{key}"
                paired(f"{name}{measure}_reduction", ours, its, lambda a, b: 1.0 - a / b)
            ours, its = f"{point}.{us}.exact", f"{point}.{other}.exact"
            paired(f"{name}quality_difference", ours, its, lambda a, b: a - b)
    kept = {
        "residency_hit_rate": f"half_memory.{OURS}.hit_rate",
        "residency_hit_ratio_belady": "half_memory.served_hit_ratio_belady",
    }
    for name, source in kept.items():
        found[name] = figures[source]
        if f"{source}_ci95" in figures:
            found[f"{name}_ci95"] = figures[f"{source}_ci95"]
    for name, pattern, parts in (
        ("goal_recovery_requests", "shift.{}.recovery_requests", adaptation.SHIFTS),
        ("new_slm_adoption_requests", "new.{}.adoption_requests", cold_start.NEW_SLMS),
        ("broken_slm_drain_requests", "broken.{}.drain_requests", adaptation.BREAKS),
    ):
        # The worst case, each a mean over seeds, because the target is for all cases.
        worst = max(parts, key=lambda part: float(figures[pattern.format(part)]))
        found[name], found[f"{name}_worst"] = figures[pattern.format(worst)], worst
        if f"{pattern.format(worst)}_ci95" in figures:
            found[f"{name}_ci95"] = figures[f"{pattern.format(worst)}_ci95"]
    return found


def points(figures: Mapping[str, Any]) -> list[str]:
    """Names of the points at which policies were compared."""
    end = f".{LARGEST}.latency_s"
    return [k.removesuffix(end) for k in figures if k.endswith(end) and not k.startswith("crowd")]


def show(figures: Mapping[str, Any]) -> None:
    """Print the figures as tables."""
    keys = ("latency_s", "latency_p95_s", "energy_j", "exact", "credit", "hit_rate", "unanswered")
    for point in points(figures):
        named = [p for p in POLICIES if f"{point}.{p}.latency_s" in figures]
        rows = [[p, *(_cell(figures, f"{point}.{p}.{k}") for k in keys)] for p in named]
        print(f"\n{point} (means over seeds, ± half of the 95 % interval)")
        print(report.table(["policy", *keys], rows))
    print("\nours over the largest SLM alone, and over the paper's policy")
    heads = ("latency_reduction", "energy_reduction", "quality_difference")
    rows = [
        [f"{point} {over}".strip(), *(_cell(figures, f"{point}.{over}{k}") for k in heads)]
        for point in points(figures)
        for _, _, over in COMPARED
    ]
    print(report.table(["point", *heads], rows))
    crowd = ("goodput_rps", "right_goodput_rps", "latency_p95_s", "shed_ratio", "exact", "lost")
    rows = [[p, *(_cell(figures, f"crowd.{p}.{k}") for k in crowd)] for p in CROWD_POLICIES]
    print("\nflash crowd, ten times the usual rate for 30 s")
    print(report.table(["policy", *crowd], rows))
    for name in ("trace", "shift", "new", "broken", "hours"):
        print(f"\n{name}")
        for key in [k for k in figures if k.startswith(f"{name}.") and not k.endswith("_ci95")]:
            print(f"  {key:<52}{_cell(figures, key):>22}")
    print("\nfigures with targets")
    for name in TARGETS:
        print(f"  {name:<32}{_cell(figures, name):>22}  {figures.get(f'{name}_worst', '')}")


def _cell(figures: Mapping[str, Any], name: str) -> str:
    if name not in figures:
        return ""
    value, around = figures[name], figures.get(f"{name}_ci95")
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return text if around is None else f"{text} ±{(around[1] - around[0]) / 2:.3f}"


def run(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Simulate, print, draw into `folder`. All figures but TARGETS are named `simulated.…`."""
    started = time.monotonic()
    data = os.environ.get("DATA_DIR")
    trace = arrivals.read_trace(Path(data)) if data else []
    if not trace:
        print("without the Azure trace: DATA_DIR is not set")
    figures = simulate(sizes, trace)
    figures["simulated_minutes"] = round((time.monotonic() - started) / 60.0, 1)
    show(figures)
    plots.draw(folder, figures, points(figures), [p for p in POLICIES if p != "single"])
    return {
        name if name.startswith(TARGETS) else f"simulated.{name}": figures[name] for name in figures
    }


def config_of(sizes: Sizes) -> dict[str, Any]:
    """The settings of the simulation."""
    return {
        "seeds": sizes.seeds,
        "requests": sizes.requests,
        "busy_ratio": scenarios.BUSY_RATIO,
        "answers_measured_at_once": CONCURRENCY,
        "feedback_ratio": adaptation.FEEDBACK_RATIO,
        "own_device_per_slm": True,
    }
