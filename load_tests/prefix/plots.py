"""Pictures of the `prefix` benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TARGET_SHARE, TARGET_IMBALANCE = 0.90, 1.25


def draw_simulated(
    folder: Path, figures: Mapping[str, Any], policies: Sequence[str], sizes: Sequence[int]
) -> None:
    """Writes prefix.png: cached share and load imbalance by policy, and ours by replicas."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), dpi=90)
    shares, loads, curve, agreement = axes
    base = "held_out.mooncake.4.1"
    shares.barh(policies, [figures[f"{base}.{p}.cached_share"] for p in policies])
    for name, style in (("pooled_ceiling", "--"), ("infinite_ceiling", ":")):
        value = figures[f"held_out.mooncake.4.{name}"]
        shares.axvline(value, linestyle=style, color="black", label=name.replace("_", " "))
    shares.set_xlabel("cached share of prompt tokens (4 replicas)")
    shares.legend(fontsize=7)
    loads.barh(policies, [figures[f"{base}.{p}.load_imbalance"] for p in policies])
    loads.axvline(TARGET_IMBALANCE, linestyle="--", color="black")
    loads.set_xlim(1.0, 2.0)
    loads.set_xlabel("work of the most loaded replica over the mean")
    for kind, color in (("mooncake", "tab:blue"), ("chats", "tab:green"), ("unnamed", "tab:red")):
        for routers, style in ((1, "o-"), (8, "^:")):
            found = [figures[f"held_out.{kind}.{n}.{routers}.ours.share_of_ceiling"] for n in sizes]
            curve.plot(sizes, found, style, color=color, label=f"{kind}, {routers} routers")
        agree = [figures[f"held_out.{kind}.{n}.8.ours.agreement"] for n in sizes]
        agreement.plot(sizes, agree, "^:", color=color, label=kind)
    curve.axhline(TARGET_SHARE, linestyle="--", color="black")
    curve.set_ylabel("ours: share of the pooled ceiling")
    agreement.set_ylabel("ours: agreement of 8 routers")
    for axis in (curve, agreement):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.set_xlabel("replicas")
        axis.set_ylim(0.0, 1.05)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "prefix.png")
    plt.close(figure)
    print(f"\npicture: {folder}/prefix.png")


def draw_live(folder: Path, figures: Mapping[str, Any], policies: Sequence[str]) -> None:
    """Writes prefix_live.png: cached share, load imbalance and time to first token, served."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, (shares, loads, times) = plt.subplots(1, 3, figsize=(12, 2.6), dpi=90)
    shares.barh(policies, [figures[f"live.{p}.cached_share"] for p in policies])
    for name, style in (("pooled_ceiling", "--"), ("infinite_ceiling", ":")):
        shares.axvline(
            figures[f"live.{name}"], linestyle=style, color="black", label=name.replace("_", " ")
        )
    shares.set_xlabel("cached share of prompt tokens")
    shares.legend(fontsize=7)
    loads.barh(policies, [figures[f"live.{p}.load_imbalance"] for p in policies])
    loads.axvline(TARGET_IMBALANCE, linestyle="--", color="black")
    loads.set_xlim(1.0, 2.0)
    loads.set_xlabel("work of the most loaded replica over the mean")
    for key, style in (("ttft_p95_ms", ":"), ("ttft_p50_ms", "-")):
        found = [figures[f"live.{p}.{key}"] for p in policies]
        times.plot(found, policies, f"o{style}", label=key[5:8])
    times.set_xlabel("ms to the first token")
    times.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "prefix_live.png")
    plt.close(figure)
    print(f"picture: {folder}/prefix_live.png")
