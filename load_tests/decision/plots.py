"""Pictures of the `decision` benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SLMS, CHARS = 8, 2000  # of the bars


def draw(
    folder: Path,
    figures: Mapping[str, Any],
    chars: Sequence[int],
    paths: Sequence[str],
    stages: Sequence[str],
    options: Sequence[str],
) -> None:
    """Writes decision.png: cost by prompt length, by stage, and by LightGBM call."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), dpi=90)
    for path, color in zip(paths, ("tab:green", "tab:blue", "tab:red"), strict=True):
        for key, style in (("p50_us", "o-"), ("p99_us", "^:")):
            found = [figures[f"{path}.{SLMS}.{n}.{key}"] for n in chars]
            left.plot(chars, found, style, color=color, label=f"{path} {key[:3]}")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("characters of the prompt")
    left.set_ylabel(f"us per decision, {SLMS} SLMs")
    left.legend(fontsize=7)
    below = [0.0] * len(paths)
    for stage in stages:
        found = [figures[f"{path}.{SLMS}.{CHARS}.{stage}.p50_us"] for path in paths]
        middle.bar(paths, found, bottom=below, label=stage)
        below = [a + b for a, b in zip(below, found, strict=True)]
    middle.set_ylabel(f"us, median, {CHARS:,} characters")
    middle.legend(fontsize=7)
    right.barh(options, [figures[f"lightgbm.{SLMS}.{name}.p50_us"] for name in options])
    right.set_xlabel(f"us, median: every head for {SLMS} candidates")
    right.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(folder / "decision.png")
    plt.close(figure)
    print(f"\npicture: {folder}/decision.png")
