"""Quality of every model of the reference fleet, as served, and the cost of its tokens.

Every held-out row of `eval/` is sent, pinned and decoded greedily, to the specialist of its task,
to the generalist and to each adapter of it. Serves the reference fleet, unless `--url` names a
service that does. In-domain for the specialists and the adapters: the rows are the held-out side of
the data that they were trained on. Open questions and choices are marked by the form of their
answers alone (`grading/marks.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import httpx

from deployments.reference_fleet.corpora import adapter_schemas
from deployments.reference_fleet.corpora.phrasing import user
from deployments.reference_fleet.grading.marks import marks, parsed
from deployments.reference_fleet.grading.rows import FILES, Row, load
from deployments.reference_fleet.paths import MODELS
from load_tests.common import report
from load_tests.common.client import (
    Answer,
    Question,
    ask,
    ask_all,
    max_tokens,
)
from load_tests.common.served import fleet_file, served
from load_tests.fleet import plots
from load_tests.fleet.summary import summary

CONCURRENCY = 16
SPECIALISTS = ("extract", "sql", "shell", "reason", "intent")
SEED = 3
COST_TOKENS = 96
COST_REPEATS = 9
ERRORS_SHOWN = 2

Figures = dict[str, Any]


@dataclass(frozen=True)
class RowAnswer:
    """One SLM's answer to one row."""

    slm: str
    row: Row
    answer: Answer

    @property
    def part(self) -> str:
        """`task.slice` without spaces, as in the names of the figures."""
        return f"{self.row.task}.{self.row.slice}".replace(" ", "_")


def questions(generalists: Sequence[str], limit: int) -> list[tuple[str, Row]]:
    """(SLM, row) pairs: at most `limit` rows of each slice, 0 for all."""
    found: list[tuple[str, Row]] = []
    for name in FILES:
        slices: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in load(name):
            slices[row.task, row.slice].append(row)
        for (task, _), rows in slices.items():
            kept = rows if not limit else Random(SEED).sample(rows, min(limit, len(rows)))
            own = [task] if task in SPECIALISTS else list(SPECIALISTS) if task == "mixed" else []
            found += [(slm, row) for slm in (*own, *generalists) for row in kept]
    return found


def adapter_rows(adapter: str, limit: int) -> list[Row]:
    """Held-out SNIPS rows of the adapter's sub-task, with answers in its schema."""
    found = []
    for row in load("extract"):
        right = parsed(row.answers[0])
        if adapter_schemas.covers(adapter, right["intent"]):
            shaped = adapter_schemas.reshaped(adapter, right["intent"], right["slots"])
            found.append(replace(row, answers=(shaped,), task="adapter", slice=adapter))
    return found[:limit] if limit else found


async def evaluate(url: str, generalists: Sequence[str], limit: int) -> list[RowAnswer]:
    """Send every row, one SLM after the other, so that SLMs do not compete for cores."""
    pairs = questions(generalists, limit)
    for adapter in adapter_schemas.ADAPTERS:
        rows = adapter_rows(adapter, limit)
        pairs += [(model, row) for model in (f"extract:{adapter}", "extract") for row in rows]
    found: list[RowAnswer] = []
    for slm in dict.fromkeys(slm for slm, _ in pairs):
        rows = [row for other, row in pairs if other == slm]
        sent = [
            Question(
                slm, [user(r.prompt)], max_tokens("extract" if r.task == "adapter" else r.task)
            )
            for r in rows
        ]
        answers = await ask_all(url, sent, CONCURRENCY, slm)
        found += [RowAnswer(slm, r, a) for r, a in zip(rows, answers, strict=True)]
    return found


def scores(answered: Iterable[RowAnswer]) -> Figures:
    """`slm.task.slice.measure` with n and the 95 % Wilson interval of the exact share."""
    groups: dict[str, list[RowAnswer]] = defaultdict(list)
    for one in answered:
        groups[f"{one.slm}.{one.part}"].append(one)
    figures: Figures = {}
    for name, group in groups.items():
        found = [_marks(one) for one in group]
        n = len(group)
        figures[f"{name}.n"] = n
        for measure in dict.fromkeys(key for one in found for key in one):
            total = sum(one.get(measure, 0.0) for one in found)
            figures[f"{name}.{measure}"] = round(total / n, 4)
            low, high = report.wilson(total, n)
            figures[f"{name}.{measure}_ci95"] = [round(low, 4), round(high, 4)]
    return figures


def _marks(one: RowAnswer) -> dict[str, float]:
    if one.row.task == "adapter":
        return {"exact": float(parsed(one.answer.text) == parsed(one.row.answers[0]))}
    return marks(one.row.task, one.answer.text, list(one.row.answers))


async def costs(url: str, slms: Sequence[str]) -> Figures:
    """Seconds per token after the first of each SLM, alone and with 16 requests in flight.

    Medians of `COST_REPEATS`, the SLMs in turn. A token's time is the latency of `COST_TOKENS`
    tokens less that of one token, over `COST_TOKENS` - 1; with 16 in flight, of the slowest.
    """
    alone: dict[str, list[float]] = defaultdict(list)
    busy: dict[str, list[float]] = defaultdict(list)
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
        for _ in range(COST_REPEATS):
            for slm in slms:
                alone[slm].append(await _token_s(client, slm, 1))
                busy[slm].append(await _token_s(client, slm, CONCURRENCY))
        rows = (await client.get("/v1/fleet")).raise_for_status().json()["slms"]
    energy = {row["id"]: row["energy_j_per_token"] for row in rows}
    figures: Figures = {}
    for slm in slms:
        figures[f"{slm}.cost.tpot_ms"] = round(1e3 * _median(alone[slm]), 3)
        figures[f"{slm}.cost.tpot_16_ms"] = round(1e3 * _median(busy[slm]), 3)
        figures[f"{slm}.cost.energy_j_per_token_estimated"] = energy[slm.partition(":")[0]]
    return figures


async def _token_s(client: httpx.AsyncClient, slm: str, count: int) -> float:
    messages = [user("Tell me everything about numbers, words and names.")]

    async def timed(tokens: int) -> float:
        question = Question(slm, messages, tokens)
        found = await asyncio.gather(
            *(ask(client, question, ignore_eos=True, min_tokens=tokens) for _ in range(count))
        )
        return max(a.latency_s for a in found)

    return (await timed(COST_TOKENS) - await timed(1)) / (COST_TOKENS - 1)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def confusions(answered: Iterable[RowAnswer], task: str) -> Counter[tuple[str, str]]:
    """Counts of (right, answered) intents of a task's own specialist."""
    found: Counter[tuple[str, str]] = Counter()
    for one in answered:
        if one.slm == one.row.task == task and one.row.slice != "odd":
            got = parsed(one.answer.text)
            label = got.get("intent") if isinstance(got, dict) else None
            found[parsed(one.row.answers[0])["intent"], str(label)] += 1
    return found


def show(answered: Sequence[RowAnswer], figures: Figures) -> None:
    """Print the score table, the most frequent confusions and some errors of every slice."""
    names = [n.removesuffix(".exact") for n in figures if n.endswith(".exact")]
    rows = [
        [
            name.replace("_", " "),
            str(figures[f"{name}.n"]),
            f"{figures[f'{name}.exact']:.3f}",
            "{:.3f} to {:.3f}".format(*figures[f"{name}.exact_ci95"]),
            ", ".join(
                f"{k.rpartition('.')[2]} {v:.2f}"
                for k, v in figures.items()
                if k.rpartition(".")[0] == name and k.rpartition(".")[2] not in ("n", "exact")
                if not k.endswith("_ci95")
            ),
        ]
        for name in names
    ]
    print(report.table(["model.task.slice", "n", "exact", "95 % interval", "parts"], rows))
    for task in ("extract", "intent"):
        wrong = [(k, n) for k, n in confusions(answered, task).most_common() if k[0] != k[1]]
        print(f"\n{task}: most frequent confusions (right, answered, times)")
        for (right, got), times in wrong[:8]:
            print(f"  {right:<28}{got:<28}{times}")
    print("\nerrors")
    shown: Counter[str] = Counter()
    for one in answered:
        name = f"{one.slm}.{one.part}"
        if not _marks(one)["exact"] and shown[name] < ERRORS_SHOWN:
            shown[name] += 1
            print(f"  {name}\n    prompt {one.row.prompt[-160:]!r}")
            print(f"    right  {one.row.answers[0][:200]!r}\n    answer {one.answer.text[:200]!r}")


def show_costs(figures: Figures, slms: Sequence[str], baseline: str) -> None:
    """Print the cost table, with the cost of `baseline` over that of each SLM."""
    rows = []
    for slm in slms:
        one = [figures[f"{slm}.cost.{key}"] for key in ("tpot_ms", "tpot_16_ms")]
        joules = figures[f"{slm}.cost.energy_j_per_token_estimated"]
        ratio = figures[f"{baseline}.cost.tpot_ms"] / one[0]
        rows.append([slm, f"{one[0]:.2f}", f"{one[1]:.2f}", f"{joules:.4f}", f"{ratio:.2f}"])
    head = ["model", "ms/token", "with 16", "J/token (est.)", f"{baseline} / this"]
    print("\n" + report.table(head, rows))


def main(arguments: Sequence[str]) -> int:
    """Command line of the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests fleet", description=__doc__)
    parser.add_argument("--url", help="a running service of these models; default: start one")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, default=report.PLOTS, help="folder of the pictures")
    parser.add_argument("--limit", type=int, default=0, help="rows of each slice; 0 takes all")
    parser.add_argument("--answers", type=Path, help="write every answer to this file (JSON lines)")
    chosen = parser.parse_args(arguments)
    fleet = fleet_file("reference")
    chats = [e for e in fleet["slms"] if "chat" in e.get("skills", ())]
    adapters = [f"{e['id']}:{a['name']}" for e in chats for a in e.get("adapters", ())]
    generalists = [*(e["id"] for e in chats), *adapters]
    slms = [*SPECIALISTS, *generalists]
    with nullcontext(chosen.url) if chosen.url else served(fleet) as url:
        figures = asyncio.run(costs(url, slms))
        answered = asyncio.run(evaluate(url, generalists, chosen.limit))
    figures |= scores(answered)
    show(answered, figures)
    show_costs(figures, slms, generalists[0])
    short = summary(figures, MODELS, adapter_schemas.ADAPTERS)
    print("\n" + "\n".join(f"{name:<42}{value}" for name, value in short.items()))
    figures = short | figures
    plots.draw(chosen.plots, figures, confusions(answered, "extract"), generalists)
    if chosen.answers:
        lines = [json.dumps([o.slm, o.row.prompt, o.row.answers, o.answer.text]) for o in answered]
        chosen.answers.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"concurrency": CONCURRENCY, "limit": chosen.limit, "decoding": "greedy"}
    config |= {"cost_tokens": COST_TOKENS, "cost_repeats": COST_REPEATS}
    report.write(chosen.json, "fleet", config, figures)
    return 0
