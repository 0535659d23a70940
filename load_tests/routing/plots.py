"""Picture of the `routing` benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(folder: Path, figures: Mapping[str, Any], policies: Sequence[str]) -> None:
    """Writes routing.png: quality over energy and over latency, of all requests."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), dpi=90, sharey=True)
    for axis, cost, label in (
        (axes[0], "energy_j", "J per request (estimated)"),
        (axes[1], "latency_s", "seconds per request"),
    ):
        for policy in policies:
            name = f"all.{policy}"
            x, y = figures[f"{name}.{cost}"], figures[f"{name}.exact"]
            low, high = figures[f"{name}.exact_ci95"]
            errors = [[max(0.0, y - low)], [max(0.0, high - y)]]
            axis.errorbar([x], [y], errors, fmt="o", capsize=2, label=policy)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("exact answers, 95 % interval")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "routing.png")
    plt.close(figure)
    print(f"\npicture: {folder}/routing.png")


def draw_tables(folder: Path, figures: Mapping[str, Any]) -> None:
    """Writes routing_tables.png: APGR in-domain and in transfer, beside the prompt's length."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [k for k in figures if k.endswith(".apgr") and not k.startswith("baseline.")]
    figure, axis = plt.subplots(figsize=(7, 2.6), dpi=90)
    for place, key in enumerate(keys):
        target = key.split(".")[1].rpartition("_to_")[2]
        axis.plot([figures[key]], [place], "o", color="C0", label="router" if not place else None)
        length = figures[f"baseline.{target}.length_apgr"]
        axis.plot([length], [place], "|", color="C1", markersize=14, label=None)
    axis.axvline(0.5, color="gray", linewidth=0.6)
    axis.set_yticks(range(len(keys)), [key.removesuffix(".apgr") for key in keys], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("APGR; 0.5 is random, a bar is the prompt's length alone")
    figure.tight_layout()
    figure.savefig(folder / "routing_tables.png")
    plt.close(figure)
    print(f"\npicture: {folder}/routing_tables.png")
