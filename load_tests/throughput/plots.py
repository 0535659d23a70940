"""Pictures of the `throughput` benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from load_tests.common.load import median

PANELS = {
    "tokens": "tokens/s, 16 at once",
    "goodput_poisson": "requests/s in SLO, Poisson",
    "goodput_azure": "requests/s in SLO, Azure code trace",
}


def draw(folder: Path, values: Mapping[str, Sequence[float]], sides: Sequence[str]) -> None:
    """Writes throughput.png: every side's median, with the range of its repeats."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 1.6 + 0.45 * len(sides)), dpi=90)
    for axis, (load, title) in zip(axes, PANELS.items(), strict=True):
        found: list[Any] = [values.get(f"{load}/{side}") or [0.0] for side in sides]
        middle = [median(v) for v in found]
        below = [m - min(v) for m, v in zip(middle, found, strict=True)]
        above = [max(v) - m for m, v in zip(middle, found, strict=True)]
        axis.barh(sides, middle, xerr=[below, above], capsize=3, color="tab:blue")
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="y", labelsize=7)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "throughput.png")
    plt.close(figure)
    print(f"\npicture: {folder}/throughput.png")
