"""Quality, latency and energy of routing policies on the standard workload.

Every request of `workloads.standard()` is sent, pinned and decoded greedily, to every SLM of the
reference fleet, and once to `/v1/route`, which decides without running anything. A policy's figures
are means over the answers of the SLMs that it chooses, so all policies are compared on the same
answers. The shipped predictor was fitted on the other half of the held-out rows: in-domain, not
in-sample.

Before that, the same learner is measured on RouteLLM's public tables if DATA_DIR is set (`tables`).
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from deployments.reference_fleet.grading.marks import credit, marks
from load_tests.common import report
from load_tests.common.client import Question, ask_all, max_tokens
from load_tests.common.served import fleet_file, served
from load_tests.common.workloads import Request, standard
from load_tests.routing import plots, tables

CONCURRENCY = 8
RESAMPLES = 2000
SEED = 5
MEASURES = ("exact", "credit", "latency_s", "energy_j")
TOKENS = ("prompt_tokens", "output_tokens")
GENERALIST = "general"

Table = NDArray[np.float64]  # [requests, SLMs]


@dataclass(frozen=True)
class Measured:
    """Every SLM's answer to every request as figures, and the router's decisions."""

    slms: tuple[str, ...]
    tables: dict[str, Table]  # one of shape [requests, SLMs] for each of MEASURES and of TOKENS
    chosen: list[str]
    reasons: Counter[str]


async def measure(url: str, slms: tuple[str, ...], workload: Sequence[Request]) -> Measured:
    """Get the decision for every request, then every SLM's answers, one SLM after the other."""
    chosen: list[str] = []
    reasons: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
        for one in tqdm(workload, desc="route", mininterval=1.0):
            body = {"model": "auto", "messages": one.messages}
            decision = (await client.post("/v1/route", json=body)).raise_for_status().json()
            # The best candidate, also where the decision explored another one.
            chosen.append(decision["candidates"][0]["slm_id"])
            reasons[decision["path"]] += 1
    tables = {name: np.zeros((len(workload), len(slms))) for name in MEASURES + TOKENS}
    for column, slm in enumerate(slms):
        sent = [Question(slm, r.messages, max_tokens(r.row.task)) for r in workload]
        for row, answer in enumerate(await ask_all(url, sent, CONCURRENCY, slm)):
            task, references = workload[row].row.task, list(workload[row].row.answers)
            tables["exact"][row, column] = marks(task, answer.text, references)["exact"]
            tables["credit"][row, column] = credit(task, answer.text, references)
            tables["latency_s"][row, column] = answer.latency_s
            tables["prompt_tokens"][row, column] = answer.prompt_tokens
            tables["output_tokens"][row, column] = answer.completion_tokens
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
        rows = (await client.get("/v1/fleet")).raise_for_status().json()["slms"]
    joules = {row["id"]: row["energy_j_per_token"] or 0.0 for row in rows}
    tables["energy_j"] = tables["output_tokens"] * np.array([joules[slm] for slm in slms])
    return Measured(slms, tables, chosen, reasons)


def policies(measured: Measured, workload: Sequence[Request]) -> dict[str, Table]:
    """Policy to its probability of each SLM for each request, [requests, SLMs]."""
    slms, count = measured.slms, len(workload)
    place = {slm: i for i, slm in enumerate(slms)}
    each = np.eye(len(slms))
    auto = each[[place[slm] for slm in measured.chosen]]
    tasks = [r.row.task if r.row.task in place else GENERALIST for r in workload]
    # The best answer; among equally good ones the one with the least energy.
    value = measured.tables["credit"] - 1e-3 * measured.tables["energy_j"]
    best = int(measured.tables["credit"].mean(axis=0).argmax())
    return {
        "calm": auto,
        f"best single ({slms[best]})": np.tile(each[best], (count, 1)),
        "random": np.full((count, len(slms)), 1.0 / len(slms)),
        "shares of calm, content-blind": np.tile(auto.mean(axis=0), (count, 1)),
        "task label (knows the task)": each[[place[task] for task in tasks]],
        "oracle (knows the answers)": each[value.argmax(axis=1)],
    }


def score(measured: Measured, weights: Table, rows: NDArray[np.bool_]) -> dict[str, Any]:
    """Means of every measure over `rows`, with 95 % bootstrap intervals over requests."""
    rng = np.random.default_rng(SEED)
    found: dict[str, Any] = {}
    for name, table in measured.tables.items():
        each = (table * weights).sum(axis=1)[rows]
        drawn = each[rng.integers(0, len(each), (RESAMPLES, len(each)))].mean(axis=1)
        found[name] = round(float(each.mean()), 4)
        found[f"{name}_ci95"] = [round(float(q), 4) for q in np.quantile(drawn, [0.025, 0.975])]
    return found


def figures_of(measured: Measured, workload: Sequence[Request]) -> dict[str, Any]:
    """`slice.policy.measure` of all requests, those without an instruction, and hard problems."""
    bare = np.array([not r.instructed for r in workload])
    hard = np.array([r.row.task == "reason" and r.row.difficulty == "hard" for r in workload])
    slices = {"all": np.full(len(workload), True), "bare": bare, "hard_reason": hard}
    found: dict[str, Any] = {}
    for part, rows in slices.items():
        found[f"{part}.n"] = int(rows.sum())
        for policy, weights in policies(measured, workload).items():
            for name, value in score(measured, weights, rows).items():
                found[f"{part}.{policy}.{name}"] = value
    for slm, count in Counter(measured.chosen).items():
        found[f"share.{slm}"] = round(count / len(workload), 4)
    for path, count in measured.reasons.items():
        found[f"path.{path}"] = round(count / len(workload), 4)
    return found


def show(measured: Measured, workload: Sequence[Request], figures: dict[str, Any]) -> None:
    """Print the policies of each slice, and the chosen SLMs by task."""
    names = list(policies(measured, workload))
    for part in ("all", "bare", "hard_reason"):
        rows = []
        for policy in names:
            cells = []
            for name in MEASURES:
                key = f"{part}.{policy}.{name}"
                low, high = figures[f"{key}_ci95"]
                cells.append(f"{figures[key]:.3f} ({low:.3f} to {high:.3f})")
            rows.append([policy, *cells])
        print(f"\n{part}: {figures[f'{part}.n']} requests")
        print(report.table(["policy", "exact", "credit", "latency s", "energy J (est.)"], rows))
    print("\nchosen SLM by task (requests without an instruction)")
    pairs = [
        (r.row.task, slm)
        for r, slm in zip(workload, measured.chosen, strict=True)
        if not r.instructed
    ]
    counts = Counter(pairs)
    tasks = sorted({task for task, _ in counts})
    rows = [[task, *(str(counts[task, slm]) for slm in measured.slms)] for task in tasks]
    print(report.table(["task", *measured.slms], rows))


def main(arguments: Sequence[str]) -> int:
    """Command line of the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests routing", description=__doc__)
    parser.add_argument(
        "--url", help="a running service of the reference fleet; default: start one"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, default=report.PLOTS, help="folder of the picture")
    parser.add_argument("--limit", type=int, default=0, help="requests of the workload; 0 is all")
    parser.add_argument("--answers", type=Path, help="write every answer as a table (npz)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--tables", action="store_true", help="only RouteLLM's tables")
    part.add_argument("--served", action="store_true", help="only the served fleet")
    chosen = parser.parse_args(arguments)
    figures = {} if chosen.served else public_tables(chosen.plots)
    if not chosen.tables:
        figures |= served_fleet(chosen)
    config = {"concurrency": CONCURRENCY, "requests": chosen.limit, "resamples": RESAMPLES}
    report.write(chosen.json, "routing", config, figures)
    return 0


def public_tables(folder: Path) -> dict[str, Any]:
    """Figures of RouteLLM's tables, none without DATA_DIR."""
    data = tables.data_folder()
    if data is None:
        print(f"without RouteLLM's tables: DATA_DIR has no folder {tables.routellm.FOLDER}")
        return {}
    figures = tables.measure(data)
    tables.show(figures)
    plots.draw_tables(folder, figures)
    return figures


def served_fleet(chosen: argparse.Namespace) -> dict[str, Any]:
    """Figures of the standard workload on the served fleet."""
    slms = tuple(e["id"] for e in fleet_file("reference")["slms"] if "skills" in e)
    workload = standard()[: chosen.limit or None]
    with nullcontext(chosen.url) if chosen.url else served() as url:
        measured = asyncio.run(measure(url, slms, workload))
    if chosen.answers:
        values: dict[str, Any] = {n: t.astype(np.float32) for n, t in measured.tables.items()}
        np.savez_compressed(chosen.answers, slms=np.array(slms), **values)
    figures = figures_of(measured, workload)
    show(measured, workload, figures)
    plots.draw(chosen.plots, figures, list(policies(measured, workload)))
    return figures
