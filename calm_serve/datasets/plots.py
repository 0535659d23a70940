"""Picture of an evaluation: cost against quality, and what more prompts to learn from bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calm_serve.datasets.evaluation import Evaluation, Figures
from calm_serve.errors import ConfigError

_POLICIES = ("router", "best_single", "task_best", "share_matched", "prompt_length", "oracle")
_UNITS = {
    "cost": "mean cost of a prompt, unit of the table",
    "latency_s": "mean seconds of a prompt",
    "percent_to_stronger": "percent of the prompts for the stronger model",
}


def draw(evaluation: Evaluation, path: Path) -> None:
    """Write the picture; its format is that of the file's ending.

    Raises ConfigError when matplotlib is not installed, or cannot write such a file.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=110)
    try:
        if evaluation.tradeoff is None:
            _draw_policies(left, evaluation.figures)
        else:
            _draw_tradeoff(left, evaluation)
        _draw_learning(right, evaluation.figures)
        figure.tight_layout()
        figure.savefig(path)
    except (OSError, ValueError) as error:  # the folder, or an ending that names no format
        raise ConfigError(f"--plot {path}: {error}") from error
    finally:
        plt.close(figure)


def _draw_tradeoff(axis: Any, evaluation: Evaluation) -> None:
    found, figures = evaluation.tradeoff, evaluation.figures
    assert found is not None
    axis.plot(found.curve.cost, found.curve.score, "o-", markersize=3, label="router")
    for model, (cost, score) in found.singles.items():
        axis.plot([cost], [score], "s", label=model)
    costs, scores = zip(*sorted(found.singles.values()), strict=True)
    axis.plot(costs, scores, ":", color="gray", label="models mixed blindly")
    axis.axhline(figures["oracle_score"], color="black", linewidth=0.6, label="oracle")
    axis.set_xlabel(_UNITS[found.cost_name])
    axis.set_ylabel("mean score")
    axis.legend(fontsize=7)


def _draw_policies(axis: Any, figures: Figures) -> None:
    names = [name for name in _POLICIES if figures[f"{name}_score"] is not None]
    for place, name in enumerate(names):
        score = figures[f"{name}_score"]
        low, high = figures[f"{name}_score_ci95"]
        axis.errorbar([score], [place], xerr=[[score - low], [high - score]], fmt="o", capsize=2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("mean score, 95 % interval")


def _draw_learning(axis: Any, figures: Figures) -> None:
    points = figures["learning_curve"]
    prompts = [point["prompts"] for point in points]
    low, high = zip(*(point["router_score_ci95"] for point in points), strict=True)
    axis.plot(prompts, [point["router_score"] for point in points], "o-", label="router")
    axis.fill_between(prompts, low, high, alpha=0.2)
    axis.axhline(figures["best_single_score"], color="gray", label="best single model")
    if figures["task_best_score"] is not None:
        axis.axhline(figures["task_best_score"], color="gray", linestyle="--", label="task known")
    axis.set_xscale("log")
    axis.set_xlabel("prompts to learn from")
    axis.set_ylabel("mean score, 95 % interval")
    axis.legend(fontsize=7)
