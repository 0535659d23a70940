"""Pictures of the `paper` experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from load_tests.common.arrivals import world_cup
from load_tests.paper.figures import Table

BINS = 48
LABELS = {
    "calm": "ours",
    "generalist": "generalist alone",
    "paper": "the paper's policy",
    "shares": "blind, ours' shares",
    "as_generalist": "ours, the generalist's quality",
    "as_paper": "ours, the paper's quality",
}
COLOURS = {
    "calm": "tab:blue",
    "generalist": "tab:red",
    "paper": "tab:orange",
    "shares": "tab:gray",
    "as_generalist": "tab:cyan",
    "as_paper": "tab:purple",
}


def draw(
    folder: Path, tables: Mapping[str, Table], figures: Mapping[str, Any], rate_per_s: float
) -> None:
    """Writes paper.png (quality over latency and energy) and paper-day.png (latency over time).

    `tables` and the figures are by scenario; `rate_per_s` is the mean rate of the day.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenarios = list(tables)
    figure, axes = plt.subplots(
        len(scenarios), 2, figsize=(8, 2.7 * len(scenarios)), dpi=90, squeeze=False
    )
    for row, scenario in enumerate(scenarios):
        for column, measure in enumerate(("latency_s", "energy_j")):
            axis = axes[row, column]
            for policy in tables[scenario].policies:
                name = f"{scenario}.{policy}"
                x, y = figures[f"{name}.{measure}"], figures[f"{name}.exact"]
                axis.errorbar(
                    [x],
                    [y],
                    yerr=_around(y, figures[f"{name}.exact_ci95"]),
                    xerr=_around(x, figures[f"{name}.{measure}_ci95"]),
                    fmt="o",
                    capsize=2,
                    color=COLOURS[policy],
                    label=LABELS[policy],
                )
            axis.set_xlim(left=0)
            axis.set_title(scenario.replace("_", " "), fontsize=9)
            axis.set_xlabel(("seconds to the last byte", "J per request")[column], fontsize=8)
            axis.tick_params(labelsize=7)
        axes[row, 0].set_ylabel("exact answers, 95 % interval", fontsize=8)
    axes[0, 1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "paper.png")
    plt.close(figure)
    if "hot" in tables:
        _day(folder / "paper-day.png", tables["hot"], rate_per_s)
    print(f"\npictures: {folder}/paper*.png")


def _around(value: float, interval: tuple[float, float]) -> list[list[float]]:
    return [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


def _day(path: Path, table: Table, rate_per_s: float) -> None:
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 4.2), dpi=90, sharex=True, height_ratios=(1, 2)
    )
    length_s = len(table) / rate_per_s
    minutes = np.arange(24 * 60) / 60.0
    above.fill_between(minutes, [rate_per_s * world_cup(h) for h in minutes], alpha=0.4)
    above.set_ylabel("arrivals/s", fontsize=8)
    edges = np.linspace(0.0, 24.0, BINS + 1)
    for policy in table.policies:
        hours = table.values(policy, "due_s") / length_s * 24.0
        latency = table.values(policy, "latency_s")
        places = np.clip(np.digitize(hours, edges) - 1, 0, BINS - 1)
        middle = [
            float(np.nanmean(latency[places == i])) if (places == i).any() else float("nan")
            for i in range(BINS)
        ]
        below.plot(
            (edges[1:] + edges[:-1]) / 2, middle, color=COLOURS[policy], label=LABELS[policy]
        )
    below.set_yscale("log")
    below.set_ylabel("mean seconds", fontsize=8)
    below.set_xlabel(f"hour of the day, compressed to {length_s:.0f} s", fontsize=8)
    below.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
