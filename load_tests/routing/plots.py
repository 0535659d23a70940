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
