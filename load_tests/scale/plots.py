"""Pictures of the `scale` benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from load_tests.scale.curves import CHECKPOINTS, OFFERED, REPLICAS
from load_tests.scale.staleness import AGES_S, ROUTERS, Setting

COLORS = ("tab:green", "tab:blue", "tab:red", "tab:orange", "tab:purple")
Figures = Mapping[str, Any]


def draw(
    folder: Path, figures: Figures, slms: Sequence[int], seen: int, parts: Sequence[str]
) -> None:
    """Writes scale.png: cost by load and size; cost and state by requests; stale load views."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.6), dpi=90)
    (offered, candidates, replicas), (cost, state, staleness) = axes
    _offered(offered, figures)
    _sizes(candidates, figures, "SLMs (candidates)", slms, {"decide": "candidates.{}"})
    cases = {"new prompts": "replicas.{}.new", "prefix cached by all": "replicas.{}.shared"}
    _sizes(replicas, figures, "replicas of one SLM", REPLICAS, cases)
    tenths = range(1, CHECKPOINTS + 1)
    requests = [seen * t // CHECKPOINTS for t in tenths]
    for stage, color in zip(("decide", "choose"), COLORS, strict=False):
        for key, style in (("p50", "o-"), ("p99", "^:")):
            found = [figures[f"seen.{t}.{stage}.{key}_us"] for t in tenths]
            cost.plot(requests, found, style, color=color, label=f"{stage} {key}")
    cost.set(xlabel="requests seen", ylabel="CPU us", yscale="log")
    stacked = [[figures[f"seen.{t}.{p}_bytes"] / 2**20 for t in tenths] for p in parts]
    state.stackplot(requests, stacked, labels=parts)
    state.set(xlabel="requests seen", ylabel="MiB of one router process's state")
    _staleness(staleness, figures)
    for one in axes.flat:
        one.legend(fontsize=7)
        one.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "scale.png")
    plt.close(figure)
    print(f"\npicture: {folder}/scale.png")


def _offered(axis: Any, figures: Figures) -> None:
    for stage, color in zip(("decide", "choose"), COLORS, strict=False):
        for key, style in (("p50", "o-"), ("p99", "^:")):
            found = [figures[f"offered.{rate}.{stage}.{key}_us"] for rate in OFFERED]
            axis.plot(list(OFFERED), found, style, color=color, label=f"{stage} {key}")
    axis.set(xlabel="requests/s offered", ylabel="CPU us", xscale="log", yscale="log")


def _sizes(
    axis: Any, figures: Figures, label: str, sizes: Sequence[int], cases: Mapping[str, str]
) -> None:
    for (name, pattern), color in zip(cases.items(), COLORS, strict=False):
        found = [figures[f"{pattern.format(n)}.p50_us"] for n in sizes]
        axis.plot(sizes, found, "o-", color=color, label=name)
        linear = [found[-1] * n / sizes[-1] for n in sizes]
        axis.plot(sizes, linear, ":", color=color, label=f"{name}, if linear")
    axis.set(xlabel=label, ylabel="CPU us, median", xscale="log", yscale="log")


def _staleness(axis: Any, figures: Figures) -> None:
    fresh = figures[f"{Setting('live_view').name}.mean_wait_ms"]
    ages = AGES_S[1:]
    for routers, color in zip(ROUTERS, COLORS, strict=False):
        for policy, style in (("live_view", "o-"), ("reports", "^:")):
            found = [figures[f"{Setting(policy, a, routers).name}.mean_wait_ms"] for a in ages]
            axis.plot(ages, found, style, color=color, label=f"{policy}, {routers} routers")
    axis.axhline(fresh, color="black", label="always fresh")
    for policy, style in (("random", "--"), ("least", ":")):
        level = figures[f"{Setting(policy).name}.mean_wait_ms"]
        axis.axhline(level, color="grey", linestyle=style, label=policy)
    axis.set(xlabel="age of the load view, s", ylabel="mean wait, ms", xscale="log")
