"""The router on RouteLLM's tables, between a weak and a strong model, by RouteLLM's measures.

`in_domain`: labels are drawn from the benchmark itself and the other prompts are tested on, as many
labels as published routers had for MMLU (1,500), and half of GSM8K (650). `transfer`: every label
is of another benchmark. Both are reported apart, because only the second says what a router does
with prompts that it was not fitted for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from calm_serve.datasets import (
    LabelledPrompts,
    ScoreTable,
    deferral_curve,
    fit_prompts,
    labelled_prompts,
    predict_prompts,
    prompt_chars,
    recovered,
    recovered_figures,
    stronger_gain,
)
from load_tests.common import report
from load_tests.routing import routellm

LABELS = {"mmlu": 1500, "gsm8k": 650}
TRANSFER = {"gsm8k": ("mmlu",), "mmlu": ("gsm8k",), "mt_bench": ("mmlu", "gsm8k")}
SEEDS = 5
MEASURES = ("apgr", "cpt50", "cpt80")
SLM_IDS = ("weak", "strong")

Line = NDArray[np.float64]


@dataclass(frozen=True)
class Benchmark:
    """One table with its features; columns are (weak, strong)."""

    table: ScoreTable
    prompts: LabelledPrompts

    @property
    def chars(self) -> Line:
        """Lengths of the prompts."""
        return prompt_chars(self.table)


def data_folder() -> Path | None:
    """RouteLLM's files below DATA_DIR; None when they are not there."""
    folder = Path(os.environ.get("DATA_DIR", "")) / routellm.FOLDER
    return folder if os.environ.get("DATA_DIR") and folder.is_dir() else None


def measure(folder: Path, seeds: int = SEEDS) -> dict[str, Any]:
    """Figures `in_domain.TABLE.MEASURE` and `transfer.FROM_to_TABLE.MEASURE`. Takes minutes."""
    found = {name: read(folder, name) for name in ("mmlu", "gsm8k", "mt_bench")}
    figures: dict[str, Any] = {}
    for name, benchmark in found.items():
        figures |= _named(f"baseline.{name}", _baselines(benchmark))
    for name, labels in LABELS.items():
        figures |= _named(f"in_domain.{name}", in_domain(found[name], labels, seeds, name))
    for target, sources in TRANSFER.items():
        name = f"transfer.{'_and_'.join(sources)}_to_{target}"
        parts = {source: found[source] for source in sources}
        figures |= _named(name, transfer(parts, found[target]))
    return figures


def read(folder: Path, name: str) -> Benchmark:
    """One of RouteLLM's tables with the features of its prompts."""
    table = routellm.read(folder, name)
    order = table.scores.mean(axis=0).argsort()
    prompts = labelled_prompts(table)
    return Benchmark(table, LabelledPrompts(prompts.features, prompts.scores[:, order]))


def in_domain(benchmark: Benchmark, labels: int, seeds: int, name: str = "") -> dict[str, Any]:
    """Means over draws of `labels` labelled prompts, with their standard deviation."""
    count = len(benchmark.table.rows)
    drawn: list[dict[str, float]] = []
    for seed in tqdm(range(seeds), desc=f"in-domain {name}", mininterval=1.0):
        places = np.random.default_rng(seed).permutation(count)
        fit, test = places[:labels].tolist(), places[labels:].tolist()
        gain = _gain(benchmark.prompts.part(fit), benchmark.prompts.part(test))
        own = _measures(gain, benchmark.prompts.scores[test])
        length = _measures(benchmark.chars[test], benchmark.prompts.scores[test])
        drawn.append({**own, **{f"length_{key}": value for key, value in length.items()}})
    figures: dict[str, Any] = {"labels": labels, "test_prompts": count - labels}
    for key in drawn[0]:
        values = [one[key] for one in drawn]
        figures |= {key: float(np.mean(values)), f"{key}_sd": float(np.std(values))}
    return figures


def transfer(sources: Mapping[str, Benchmark], target: Benchmark) -> dict[str, Any]:
    """Fitted on LABELS of each source, measured on the whole target, with intervals over it."""
    parts = []
    for name, source in sources.items():
        places = np.random.default_rng(0).permutation(len(source.table.rows))[: LABELS[name]]
        parts.append(source.prompts.part(places.tolist()))
    gain = _gain(joined(parts), target.prompts)
    scores = target.prompts.scores
    return {
        "labels": sum(len(part.features) for part in parts),
        "test_prompts": len(scores),
        **recovered_figures(gain, scores),
    }


def joined(parts: Sequence[LabelledPrompts]) -> LabelledPrompts:
    """All prompts of several tables of the same models."""
    features = tuple(one for part in parts for one in part.features)
    return LabelledPrompts(features, np.concatenate([part.scores for part in parts]))


def show(figures: Mapping[str, Any]) -> None:
    """Print the figures, in-domain and transfer apart."""
    for part in ("baseline", "in_domain", "transfer"):
        keys = [key.removesuffix("apgr") for key in figures if key.startswith(f"{part}.")]
        rows = []
        for key in (key for key in keys if f"{key}apgr" in figures):
            _, name, by = key.split(".")
            cells = [_cell(figures, f"{key}{measure}") for measure in MEASURES]
            rows.append([name, by.rstrip("_") or "router", *cells])
        print(f"\n{part.replace('_', ' ')}")
        print(report.table(["table", "by", "APGR", "CPT50 %", "CPT80 %"], rows))


def _cell(figures: Mapping[str, Any], key: str) -> str:
    text = f"{figures[key]:.3f}" if key.endswith("apgr") else f"{figures[key]:.1f}"
    if (sd := figures.get(f"{key}_sd")) is not None:
        return f"{text} +- {sd:.3f}" if key.endswith("apgr") else f"{text} +- {sd:.1f}"
    if (interval := figures.get(f"{key}_ci95")) is not None:
        return f"{text} ({interval[0]:.3g} to {interval[1]:.3g})"
    return text


def _baselines(benchmark: Benchmark) -> dict[str, Any]:
    """What needs no labels, and the best order that there is."""
    scores = benchmark.prompts.scores
    gains = {
        "length": benchmark.chars,
        "random": np.random.default_rng(0).random(len(scores)),
        "oracle": scores[:, 1] - scores[:, 0],
    }
    found: dict[str, Any] = {"test_prompts": len(scores)}
    for name, gain in gains.items():
        found |= {f"{name}_{key}": value for key, value in _measures(gain, scores).items()}
    return found


def _gain(fit: LabelledPrompts, test: LabelledPrompts) -> Line:
    artifact = fit_prompts(fit, SLM_IDS, created_at=0.0)
    predicted = predict_prompts(artifact, SLM_IDS, test.features, fit.means)
    return stronger_gain(predicted, test.scores)


def _measures(gain: Line, scores: Line) -> dict[str, float]:
    weak, strong = scores[:, 0], scores[:, 1]
    curve = deferral_curve(gain, weak, strong)
    return asdict(recovered(curve, float(weak.mean()), float(strong.mean())))


def _named(prefix: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in figures.items()}
