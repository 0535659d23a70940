"""Pictures of the `overhead` benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "ttft_overhead_p50_ms": "added TTFT p50, ms",
    "gap_overhead_p50_ms": "added gap p50, ms",
    "e2e_overhead_p50_ms": "added end-to-end p50, ms",
}
BARS = {"": ("fast transport", "tab:blue"), "_no_fast_flags": ("without flags", "tab:orange")}


def draw(folder: Path, figures: Mapping[str, Any], concurrencies: Sequence[int]) -> None:
    """Writes overhead.png: latency added to pinned, streamed requests, by concurrency."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.4), dpi=90)
    for axis, (measure, title) in zip(axes, PANELS.items(), strict=True):
        for place, (suffix, (label, color)) in enumerate(BARS.items()):
            names = [f"pinned.c{c}.streamed.{measure}" for c in concurrencies]
            values = [figures.get(name + suffix, 0.0) for name in names]
            pairs = list(zip(names, values, strict=True))
            ranges = [figures.get(f"{name}_range{suffix}", (v, v)) for name, v in pairs]
            below = [v - low for v, (low, _) in zip(values, ranges, strict=True)]
            above = [high - v for v, (_, high) in zip(values, ranges, strict=True)]
            at = [i + 0.4 * place for i in range(len(values))]
            axis.bar(at, values, 0.38, yerr=[below, above], capsize=3, color=color, label=label)
        axis.set_xticks([i + 0.2 for i in range(len(concurrencies))], concurrencies)
        axis.set_xlabel("requests at once")
        axis.set_title(title, fontsize=9)
        axis.axhline(0, color="black", linewidth=0.6)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "overhead.png")
    plt.close(figure)
    print(f"\npicture: {folder}/overhead.png")
