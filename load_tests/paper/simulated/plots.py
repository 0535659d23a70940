"""Pictures of the simulated part of the `paper` experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from load_tests.paper.simulated.scenarios import BUSY_RATIO

Figures = Mapping[str, Any]
COLOURS = plt.get_cmap("tab20")
LABELS = {"latency_s": "seconds per request", "energy_j": "J per request"}
KINDS = ("calm", "lru", "lfu", "static")


def draw(folder: Path, figures: Figures, points: Sequence[str], policies: Sequence[str]) -> None:
    """Writes paper-simulated.png (policies) and paper-changes.png (traces and changes)."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [p for p in points if not p.startswith("load_")]
    figure, axes = plt.subplots(len(shown), 2, figsize=(9, 2.8 * len(shown)), dpi=90, squeeze=False)
    for row, point in zip(axes, shown, strict=True):
        for axis, key in zip(row, ("latency_s", "energy_j"), strict=True):
            for index, policy in enumerate(policies):
                _point(axis, figures, f"{point}.{policy}", key, COLOURS(index % COLOURS.N))
            axis.set(xlabel=LABELS[key], xscale="log")
            axis.grid(alpha=0.3)
        row[0].set(ylabel=f"{point}: exact answers")
    axes[0, 1].legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(folder / "paper-simulated.png")
    plt.close(figure)
    _changes(folder, figures)
    print(f"\npictures: {folder}/paper-simulated.png, {folder}/paper-changes.png")


def _point(axis: Any, figures: Figures, name: str, key: str, colour: Any) -> None:
    if f"{name}.{key}" not in figures:
        return
    x, y = figures[f"{name}.{key}"], figures[f"{name}.exact"]
    x_error, y_error = (_half(figures, f"{name}.{k}") for k in (key, "exact"))
    label = name.rpartition(".")[2]
    errors = [[y_error]] * 2, [[x_error]] * 2
    axis.errorbar([x], [y], *errors, fmt="o", capsize=2, label=label, color=colour)


def _changes(folder: Path, figures: Figures) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), dpi=90)
    traces, cases, loads = axes
    for place, name in enumerate(("mixed", "phases")):
        for offset, kind in enumerate(KINDS):
            key = f"trace.{name}.{kind}.hit_rate"
            traces.bar(place + 0.2 * offset, figures[key], 0.18, color=f"C{offset}")
        traces.hlines(figures[f"trace.{name}.belady"], place - 0.1, place + 0.7, color="black")
    traces.set_xticks([0.3, 1.3], ["mixed", "phases"])
    traces.set(ylabel="hits per arrival (line: Belady)")
    traces.legend(
        [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(KINDS))], KINDS, fontsize=7
    )
    ends = (".recovery_requests", ".adoption_requests", ".drain_requests")
    found = [k for k in figures if k.endswith(ends) and ".alone." not in k]
    for place, key in enumerate(found):
        cases.barh(place, figures[key], xerr=_half(figures, key), color="tab:blue")
    cases.set_yticks(range(len(found)), [k.rpartition(".")[0] for k in found], fontsize=7)
    cases.set(xlabel="requests until the criterion holds")
    end = ".calm.latency_s"
    names = [k.removesuffix(end) for k in figures if k.startswith("load_") and k.endswith(end)]
    busy = sorted([(float(n.partition("_")[2]), n) for n in names] + [(BUSY_RATIO, "hot")])
    for key in ("latency_s", "energy_j"):
        ratio = [figures[f"{p}.calm.{key}"] / figures[f"{p}.largest.{key}"] for _, p in busy]
        loads.plot([load for load, _ in busy], ratio, "o-", label=key)
    loads.axhline(1.0, color="black", linewidth=0.8)
    loads.set(xlabel="load of the largest SLM alone", ylabel="ours over the largest alone")
    loads.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "paper-changes.png")
    plt.close(figure)


def _half(figures: Figures, name: str) -> float:
    low, high = figures.get(f"{name}_ci95", (0.0, 0.0))
    return float(high - low) / 2.0
