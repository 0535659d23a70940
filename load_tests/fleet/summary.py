"""A dozen figures of the reference fleet, summarised from the figures of every slice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from load_tests.common.report import Z95, wilson

Figures = dict[str, Any]
# Slices on which the generalist is compared with the specialists: their own, without those made to
# be beyond them.
OWN_SLICES = (
    "extract.extract.snips.exact",
    "sql.sql.wikisql.exact",
    "sql.sql.advising.exact",
    "shell.shell.nl2bash.template",
    "reason.reason.1_step.exact",
    "reason.reason.2_steps.exact",
    "reason.reason.3_steps.exact",
    "intent.intent.in_scope.exact",
    "intent.intent.out_of_scope.exact",
)
SCORES = {
    "extract_exact_match": ("extract.extract.snips.exact",),
    "sql_exact_match": ("sql.sql.wikisql.exact",),
    "advising_exact_match": ("sql.sql.advising.exact",),
    "shell_template_accuracy": ("shell.shell.nl2bash.template",),
    "reason_accuracy_1_2_steps": ("reason.reason.1_step.exact", "reason.reason.2_steps.exact"),
    "reason_accuracy_5_6_steps": ("reason.reason.5_steps.exact", "reason.reason.6_steps.exact"),
    "general_knowledge_accuracy": ("general.knowledge.knowledge.exact",),
    "general_prose_ratio": ("general.open.mt_bench.exact", "general.open.vicuna_bench.exact"),
    "intent_in_scope_accuracy": ("intent.intent.in_scope.exact",),
    "intent_oos_recall": ("intent.intent.out_of_scope.exact",),
}


def summary(figures: Mapping[str, Any], models: Path, adapters: Iterable[str]) -> Figures:
    """Scores with 95 % intervals, the generalist's worst gap and cost, the least adapter gain.

    `models` is the folder whose weights are counted, in MB (10**6 bytes). A gap is the specialist's
    share less the generalist's on the same rows. Intervals of gaps and gains are the normal
    approximation for independent shares, which is wider than necessary for paired ones.
    """
    found: Figures = {}
    for name, parts in SCORES.items():
        n = sum(figures[_n(part)] for part in parts)
        right = sum(figures[part] * figures[_n(part)] for part in parts)
        found[name] = round(right / n, 4)
        found[f"{name}_ci95"] = [round(x, 4) for x in wilson(right, n)]
    gaps = {own: (own, f"general.{own.partition('.')[2]}") for own in OWN_SLICES}
    worst = max(gaps, key=lambda own: figures[gaps[own][0]] - figures[gaps[own][1]])
    found |= _difference(figures, "general_worst_gap", *gaps[worst])
    found["general_worst_gap_slice"] = worst
    cost = figures["general.cost.tpot_ms"]
    specialists = ("extract", "sql", "shell", "reason", "intent")
    ratios = [cost / figures[f"{slm}.cost.tpot_ms"] for slm in specialists]
    found["general_cost_ratio"] = round(median(ratios), 2)  # to the median specialist
    found["general_cost_ratio_least"] = round(min(ratios), 2)
    pairs = [
        (f"extract:{name}.adapter.{name}.exact", f"extract.adapter.{name}.exact")
        for name in adapters
    ]
    least = min(pairs, key=lambda pair: figures[pair[0]] - figures[pair[1]])
    found |= _difference(figures, "adapter_gain", *least)
    weights = sum(path.stat().st_size for path in models.rglob("*.safetensors"))
    found["weights_mb"] = round(weights / 1e6, 1)
    return found


def _n(part: str) -> str:
    return f"{part.rpartition('.')[0]}.n"


def _difference(figures: Mapping[str, Any], name: str, high: str, low: str) -> Figures:
    a, b = figures[high], figures[low]
    spread = Z95 * math.sqrt(a * (1 - a) / figures[_n(high)] + b * (1 - b) / figures[_n(low)])
    return {
        name: round(a - b, 4),
        f"{name}_ci95": [round(a - b - spread, 4), round(a - b + spread, 4)],
    }
