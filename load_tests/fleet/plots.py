"""Pictures of the `fleet` benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SLICES = (
    ("extract", "snips", "exact"),
    ("sql", "advising", "exact"),
    ("sql", "wikisql", "exact"),
    ("shell", "nl2bash", "template"),
    ("reason", "svamp", "exact"),
    ("intent", "in_scope", "exact"),
    ("intent", "out_of_scope", "exact"),
)
STEPS = tuple(f"{n}_step{'s' if n > 1 else ''}" for n in range(1, 7))


def draw(
    folder: Path,
    figures: Mapping[str, Any],
    confusion: Counter[tuple[str, str]],
    generalists: Sequence[str],
) -> None:
    """Writes fleet-scores.png, fleet-steps.png, fleet-cost.png and fleet-confusion.png."""
    folder.mkdir(parents=True, exist_ok=True)
    _scores(folder / "fleet-scores.png", figures, generalists)
    _steps(folder / "fleet-steps.png", figures, generalists)
    _cost(folder / "fleet-cost.png", figures)
    _confusion(folder / "fleet-confusion.png", confusion)
    print(f"\npictures: {folder}/fleet-*.png")


def _with_interval(figures: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """A share, and how far its interval reaches below and above it."""
    share = figures.get(name, 0.0)
    low, high = figures.get(f"{name}_ci95", (share, share))
    return share, max(0.0, share - low), max(0.0, high - share)


def _scores(path: Path, figures: Mapping[str, Any], generalists: Sequence[str]) -> None:
    figure, axis = plt.subplots(figsize=(8, 3.2), dpi=90)
    width = 0.8 / (1 + len(generalists))
    for index, model in enumerate(("specialist", *generalists)):
        found = [
            _with_interval(
                figures, f"{task if model == 'specialist' else model}.{task}.{part}.{mark}"
            )
            for task, part, mark in SLICES
        ]
        places = [i + index * width for i in range(len(SLICES))]
        errors = [[f[1] for f in found], [f[2] for f in found]]
        axis.bar(places, [f[0] for f in found], width, yerr=errors, capsize=2, label=model)
    labels = [f"{task}\n{part.replace('_', ' ')}\n({mark})" for task, part, mark in SLICES]
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(SLICES))], labels, fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share right, 95 % interval")
    axis.legend(fontsize=8)
    _save(figure, path)


def _steps(path: Path, figures: Mapping[str, Any], generalists: Sequence[str]) -> None:
    figure, axis = plt.subplots(figsize=(5, 3), dpi=90)
    for model in ("reason", *generalists):
        found = [_with_interval(figures, f"{model}.reason.{step}.exact") for step in STEPS]
        errors = [[f[1] for f in found], [f[2] for f in found]]
        axis.errorbar(range(1, 7), [f[0] for f in found], errors, fmt="o-", capsize=2, label=model)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("steps of the problem")
    axis.set_ylabel("right result, 95 % interval")
    axis.legend(fontsize=8)
    _save(figure, path)


def _cost(path: Path, figures: Mapping[str, Any]) -> None:
    slms = [name.split(".")[0] for name in figures if name.endswith(".cost.tpot_ms")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), dpi=90)
    for offset, key, label in ((0.0, "tpot_ms", "alone"), (0.4, "tpot_16_ms", "16 in flight")):
        places = [i + offset for i in range(len(slms))]
        left.bar(places, [figures[f"{s}.cost.{key}"] for s in slms], 0.4, label=label)
    left.set_xticks([i + 0.2 for i in range(len(slms))], slms, fontsize=8, rotation=30)
    left.set_ylabel("ms per token")
    left.legend(fontsize=8)
    joules = [figures[f"{s}.cost.energy_j_per_token_estimated"] or 0.0 for s in slms]
    right.bar(slms, joules, color="tab:green")
    right.tick_params(axis="x", labelsize=8, rotation=30)
    right.set_ylabel("J per token (estimated)")
    _save(figure, path)


def _confusion(path: Path, confusion: Counter[tuple[str, str]]) -> None:
    names = sorted({right for right, _ in confusion})
    columns = [*names, *sorted({got for _, got in confusion} - set(names))]
    figure, axis = plt.subplots(figsize=(5.6, 4.4), dpi=90)
    table = [[confusion[right, got] for got in columns] for right in names]
    axis.imshow(table, cmap="Blues")
    for row, counts in enumerate(table):
        for column, count in enumerate(counts):
            if count:
                axis.text(column, row, str(count), ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("answered")
    axis.set_ylabel("right")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
