"""Pictures of the served changes of the `paper` experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from load_tests.paper.changes.figures import (
    WINDOW,
    measured,
    running,
    windows,
)
from load_tests.paper.figures import Record

SHARE_OF = 40  # requests over which a share is shown
METRICS = (("mix", "energy_j", "J per request"), ("load", "latency_s", "p95 seconds"))

Parts = Mapping[str, Sequence[Record]]


def draw(
    folder: Path,
    parts: Parts,
    limits: Mapping[str, float],
    broken: Sequence[tuple[str, str, float]],
    joining_slm: str,
) -> None:
    """Writes paper-served-changes.png: goals and shares of SLMs over the number of requests."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(3, 2, figsize=(10, 8.4), dpi=90)
    for axis, (name, metric, label) in zip(axes[0], METRICS, strict=True):
        if name in limits:
            _goal(axis, parts, name, metric, limits[name])
            axis.set_ylabel(f"{label} of the next {WINDOW}", fontsize=8)
    for axis, (slm, checkpoint, ratio) in zip(axes[1], broken, strict=True):
        if f"broken {slm}" in parts:
            _shares(axis, [parts["settled"], parts[f"broken {slm}"]], slm)
            title = f"{slm} has the weights of {checkpoint}; {100 * ratio:.0f} % with feedback"
            axis.set_title(title, fontsize=9)
    arrived, quality = axes[2]
    for key, label in (("settled", "predictor trained on it"), ("arrival", "joining")):
        if key in parts:
            arrived.plot(running(parts[key], lambda r: r.slm == joining_slm, SHARE_OF), label=label)
    arrived.set_title(f"{joining_slm} joins a running fleet", fontsize=9)
    for key in ("settled", *(f"broken {b[0]}" for b in broken), "mislearned", "rollback"):
        if parts.get(key):
            quality.plot(running(parts[key], lambda r: r.credit, SHARE_OF), label=key)
    quality.set_title("quality of the answers", fontsize=9)
    quality.set_ylabel(f"credit, last {SHARE_OF}", fontsize=8)
    for axis in axes.flat:
        axis.set_xlabel("requests from the change on", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    arrived.set_ylabel(f"share of the last {SHARE_OF}", fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "paper-served-changes.png")
    plt.close(figure)
    print(f"\npicture: {folder}/paper-served-changes.png")


def _goal(axis: Any, parts: Parts, name: str, metric: str, limit: float) -> None:
    before, after = (windows(parts[f"{name} {when}"], metric) for when in ("before", "after"))
    places = [i - len(parts[f"{name} before"]) for i in range(len(before))]
    axis.plot(places, before, color="tab:gray", label="before")
    axis.plot(after, color="tab:blue", label="with the goal")
    without = measured(parts[f"{name} without"], metric)
    axis.axhline(without, color="tab:red", linestyle="--", label="with the stated weights alone")
    axis.axhline(limit, color="black", linewidth=0.8)
    axis.axhline(1.1 * limit, color="black", linewidth=0.8, linestyle=":")
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_ylim(bottom=0)
    axis.set_title({"mix": "the mix of tasks shifts", "load": "the load doubles"}[name], fontsize=9)


def _shares(axis: Any, both: Sequence[Sequence[Record]], slm: str) -> None:
    whole = [r for part in both for r in part]
    values = running(whole, lambda r: r.slm == slm, SHARE_OF)
    axis.plot([i - len(both[0]) for i in range(len(whole))], values)
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"share of the last {SHARE_OF}", fontsize=8)
