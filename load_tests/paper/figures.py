"""Figures of the `paper` experiment: graded requests, and one policy compared with another.

Every policy has the same requests at the same times, so intervals are of paired requests: a
bootstrap draws places in the sequence of arrivals and takes all policies' records at each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from load_tests.common import report
from load_tests.paper.simulated.belady import belady

GENERALIST, PAPER, SHARES, OURS = "generalist", "paper", "shares", "calm"
# Ours for an operator who wants another policy's quality at the lowest cost.
AS_GENERALIST, AS_PAPER = "as_generalist", "as_paper"
# Order of the first turns: the last three depend on results of the first three.
POLICIES = (GENERALIST, PAPER, OURS, AS_GENERALIST, AS_PAPER, SHARES)
# Prefixes of the figures of ours over each other policy.
OVER = {GENERALIST: "", PAPER: "paper_policy_", SHARES: "share_matched_"}
RESIDENCY_PREFIXES = {
    OURS: "",
    PAPER: OVER[PAPER],
    SHARES: OVER[SHARES],
    AS_GENERALIST: "as_generalist_",
    AS_PAPER: "as_paper_",
}
PAIRS = (
    *((OURS, other, over) for other, over in OVER.items()),
    (AS_GENERALIST, GENERALIST, "as_generalist_"),
    (AS_PAPER, PAPER, "as_paper_"),
)
RESAMPLES = 2000
SEED = 11

Figures = dict[str, Any]
Values = NDArray[np.float64]


@dataclass(slots=True)
class Record:
    """One request under one policy. Times in seconds; `energy_j` is filled in by its outcome."""

    scenario: str
    policy: str
    place: int  # in the sequence of arrivals
    request: int  # in the workload
    due_s: float  # from the start of the sequence, without the turns of other policies
    latency_s: float = float("nan")  # from when it was due to the last byte
    slm: str = ""
    reason: str = ""
    decision_id: str = ""
    error: str = ""
    exact: float = 0.0
    credit: float = 0.0
    output_tokens: int = 0
    energy_j: float = float("nan")
    energy_source: str = ""
    preferred: str = ""  # SLM that would have been chosen had all been hot
    preferred_hot: bool | None = None  # None where residency is not planned


class Table:
    """The records of one scenario, a row per place and a column per policy."""

    def __init__(self, records: Sequence[Record], policies: Sequence[str]) -> None:
        self.policies = [p for p in policies if any(r.policy == p for r in records)]
        by = {(r.policy, r.place): r for r in records}
        places = sorted({r.place for r in records})
        # An interrupted run may lack a policy at some places.
        kept = [i for i in places if all((p, i) in by for p in self.policies)]
        self.records = {p: [by[p, i] for i in kept] for p in self.policies}
        self._drawn = np.random.default_rng(SEED).integers(0, len(kept), (RESAMPLES, len(kept)))

    def __len__(self) -> int:
        return int(self._drawn.shape[1])

    def values(self, policy: str, measure: str) -> Values:
        """One measure of one policy by place; NaN where there was no answer."""
        return np.array([getattr(r, measure) for r in self.records[policy]], dtype=float)

    def reduction(self, ours: str, other: str, measure: str) -> tuple[float, list[float]]:
        """1 - mean of ours / mean of the other, with its CI95, over requests that both answered."""
        a, b = self._paired(ours, other, measure)
        drawn = 1.0 - np.nanmean(a[self._drawn], axis=1) / np.nanmean(b[self._drawn], axis=1)
        return 1.0 - float(np.nanmean(a) / np.nanmean(b)), _interval(drawn)

    def difference(self, ours: str, other: str, measure: str) -> tuple[float, list[float]]:
        """Mean of ours less mean of the other, with its CI95; a missing answer has the grade 0."""
        each = self.values(ours, measure) - self.values(other, measure)
        return float(each.mean()), _interval(each[self._drawn].mean(axis=1))

    def mean(self, policy: str, measure: str) -> tuple[float, list[float]]:
        """The mean over answered requests, with its CI95."""
        each = self.values(policy, measure)
        return float(np.nanmean(each)), _interval(np.nanmean(each[self._drawn], axis=1))

    def _paired(self, ours: str, other: str, measure: str) -> tuple[Values, Values]:
        a, b = self.values(ours, measure), self.values(other, measure)
        both = np.isfinite(a) & np.isfinite(b)
        return np.where(both, a, np.nan), np.where(both, b, np.nan)


def comparisons(table: Table, prefix: str = "") -> Figures:
    """Ours over every other policy: `{prefix}{over}latency_reduction` etc., with `_ci95`."""
    found: Figures = {}
    for ours, other, over in PAIRS:
        if ours not in table.policies or other not in table.policies:
            continue
        for name, pair in {
            "latency_reduction": table.reduction(ours, other, "latency_s"),
            "energy_reduction": table.reduction(ours, other, "energy_j"),
            "quality_difference": table.difference(ours, other, "exact"),
            "credit_difference": table.difference(ours, other, "credit"),
        }.items():
            found[f"{prefix}{over}{name}"] = round(pair[0], 4)
            found[f"{prefix}{over}{name}_ci95"] = [round(v, 4) for v in pair[1]]
    return found


def per_policy(table: Table, scenario: str) -> Figures:
    """`{scenario}.{policy}.{measure}`: means with their CI95, quantiles, shares and errors."""
    found: Figures = {f"{scenario}.requests": len(table)}
    for policy in table.policies:
        name = f"{scenario}.{policy}"
        for measure in ("latency_s", "energy_j", "exact", "credit"):
            middle, interval = table.mean(policy, measure)
            found[f"{name}.{measure}"] = round(middle, 4)
            found[f"{name}.{measure}_ci95"] = [round(v, 4) for v in interval]
        latency = table.values(policy, "latency_s")
        for quantile in (50, 95):
            value = float(np.nanquantile(latency, quantile / 100))
            found[f"{name}.latency_p{quantile}_s"] = round(value, 4)
        records = table.records[policy]
        found[f"{name}.errors"] = sum(bool(r.error) for r in records)
        counts = Counter(r.slm for r in records if r.slm)
        for slm, count in sorted(counts.items()):
            found[f"{name}.share.{slm}"] = round(count / len(records), 4)
    return found


def residency(table: Table, slots: int) -> Figures:
    """Hit rates where memory was limited: share of decisions whose preferred SLM was hot.

    `..._hit_ratio_belady` is relative to the offline optimum on the same preferences with `slots`
    equal places, which initially hold the SLMs requested first; the optimum may bypass.
    """
    found: Figures = {}
    for policy, prefix in RESIDENCY_PREFIXES.items():
        if policy not in table.policies:
            continue
        observed = [r for r in table.records[policy] if r.preferred_hot is not None]
        if not observed:
            continue
        trace = [r.preferred for r in observed]
        start = list(dict.fromkeys(trace))[:slots]
        best = belady(trace, slots, start, bypass=True)
        hits = sum(bool(r.preferred_hot) for r in observed)
        found[f"{prefix}residency_hit_rate"] = round(hits / len(observed), 4)
        found[f"{prefix}residency_hit_rate_belady"] = round(best / len(observed), 4)
        found[f"{prefix}residency_hit_ratio_belady"] = round(hits / best, 4)
    return found


def show(table: Table, scenario: str, figures: Mapping[str, Any]) -> None:
    """Print one scenario's table."""
    rows = []
    for policy in table.policies:
        name = f"{scenario}.{policy}"
        low, high = figures[f"{name}.exact_ci95"]
        rows.append(
            [
                policy,
                *(f"{figures[f'{name}.latency_{k}']:.3f}" for k in ("s", "p50_s", "p95_s")),
                f"{figures[f'{name}.energy_j']:.3f}",
                f"{figures[f'{name}.exact']:.3f} ({low:.3f} to {high:.3f})",
                f"{figures[f'{name}.credit']:.3f}",
                str(figures[f"{name}.errors"]),
            ]
        )
    head = ["policy", "mean s", "p50 s", "p95 s", "J/request", "exact", "credit", "errors"]
    print(f"\n{scenario}: {len(table)} requests for each policy")
    print(report.table(head, rows), flush=True)


def show_comparisons(figures: Mapping[str, Any], prefixes: Sequence[str]) -> None:
    """Print ours compared with the others, a row per scenario and other policy."""
    rows = []
    for prefix in prefixes:
        for ours, other, over in PAIRS:
            names = [
                f"{prefix}{over}{k}"
                for k in ("latency_reduction", "energy_reduction", "quality_difference")
            ]
            if names[0] in figures:
                cells = [_with_interval(figures, name) for name in names]
                rows.append([f"{prefix.rstrip('_') or 'hot'}: {ours} over {other}", *cells])
    head = [
        "one policy over another",
        "latency reduction",
        "energy reduction",
        "quality difference",
    ]
    print("\n" + report.table(head, rows), flush=True)


def _with_interval(figures: Mapping[str, Any], name: str) -> str:
    low, high = figures[f"{name}_ci95"]
    return f"{figures[name]:+.3f} ({low:+.3f} to {high:+.3f})"


def _interval(drawn: Values) -> list[float]:
    return [float(q) for q in np.quantile(drawn, [0.025, 0.975])]
