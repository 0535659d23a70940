"""Cost against quality: between two models by RouteLLM's measures, among several by a price.

Between two models a router orders prompts by what the stronger model gains. At each of eleven
shares of prompts for the stronger model the curve has the mean score. (Ong and others,
arXiv 2406.18665.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calm_serve.datasets.table import ScoreTable, Values
from calm_serve.learning import ci95

Line = NDArray[np.float64]  # [points] or [rows]

STEPS = 10  # of the share of prompts that the stronger model gets
PRICES = 40  # points of a curve of several models
_PRICE_DECADES = 3.0  # a price makes the dearest model's cost count 0.001 to 1000 in score
RESAMPLES = 200  # for intervals of Recovered; each orders all prompts again
MEASURES = ("apgr", "cpt50", "cpt80")  # fields of Recovered


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of increasing cost; `score` runs parallel."""

    cost: Line
    score: Line


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """The router's curve, and each model alone as (cost, score)."""

    cost_name: str  # "cost" or "latency_s" of the table, or "percent_to_stronger"
    curve: Curve
    singles: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Recovered:
    """How much of the gap between two models a curve closes.

    `apgr` is the area under the curve over that under the weaker model's score, of the stronger
    model's: 0.5 at random. `cpt50` and `cpt80` are the percent of prompts that the stronger model
    must get for half and for four fifths of the gap.
    """

    apgr: float
    cpt50: float
    cpt80: float


def deferral_curve(gain: Line, weak: Line, strong: Line, *, seed: int = 0) -> Curve:
    """Mean score against the percent of prompts that go to the stronger model.

    `gain` orders the prompts, highest first; `weak` and `strong` are both models' scores, all of
    shape [rows]. Equal gains are ordered at random, or a constant would look like a router. The
    thresholds are quantiles of `gain`, so a curve is a measure of order alone.
    """
    count = len(gain)
    order = np.lexsort((np.random.default_rng(seed).random(count), -gain))
    sums = np.concatenate(([0.0], np.cumsum((strong - weak)[order])))
    # Prompts at or above the quantile at i / STEPS, which may lie between two of them.
    above = [count - -(-i * (count - 1) // STEPS) for i in range(STEPS)]
    taken = np.array([0, *reversed(above)])
    return Curve(taken * (100.0 / count), (weak.sum() + sums[taken]) / count)


def recovered(curve: Curve, weak: float, strong: float) -> Recovered:
    """Measures of a curve between the mean scores of two models, `weak` < `strong`."""
    area = float(np.trapezoid(curve.score, curve.cost / 100.0))

    def percent(part: float) -> float:
        target = weak + part * (strong - weak)
        return float(np.interp(target, curve.score, curve.cost))

    return Recovered((area - weak) / (strong - weak), percent(0.5), percent(0.8))


def recovered_figures(gain: Line, scores: Values, *, seed: int = 0) -> dict[str, Any]:
    """MEASURES between two models and their intervals, all None where there is no gap.

    `scores` has shape [rows, 2]. The interval is over prompts. Without a gap both models have the
    same mean, or there are not two.
    """
    whole = _recovered(gain, scores)
    if whole is None:
        return {f"{name}{end}": None for name in MEASURES for end in ("", "_ci95")}
    random = np.random.default_rng(seed)
    drawn = [
        _recovered(gain[rows], scores[rows])
        for rows in random.integers(len(gain), size=(RESAMPLES, len(gain)))
    ]
    values = [asdict(found) for found in drawn if found is not None]
    intervals = {
        f"{name}_ci95": list(ci95(np.array([value[name] for value in values]))) for name in MEASURES
    }
    return {**asdict(whole), **intervals}


def stronger_gain(values: Values, scores: Values) -> Line:
    """What the model with the highest mean score gains over the one with the lowest, by `values`.

    Both have shape [rows, models].
    """
    weak, strong = _weak_and_strong(scores)
    return np.asarray(values[:, strong] - values[:, weak])


def tradeoff(predicted: Values, test: ScoreTable, mean_costs: Line | None) -> Tradeoff | None:
    """The curve over the table's costs, else its latencies, else calls of the stronger of two.

    `mean_costs` is of the train rows, in the same unit, None when the table has neither. None when
    there is no cost and there are more than two models.
    """
    costs = test.costs if test.costs is not None else test.latencies_s
    if costs is not None and mean_costs is not None:
        name = "cost" if test.costs is not None else "latency_s"
        curve = price_curve(predicted, test.scores, costs, mean_costs)
        return Tradeoff(name, curve, _singles(costs, test))
    if len(test.models) != 2:
        return None
    weak, strong = _weak_and_strong(test.scores)
    calls = np.zeros_like(test.scores)
    calls[:, strong] = 100.0
    gain = stronger_gain(predicted, test.scores)
    curve = deferral_curve(gain, test.scores[:, weak], test.scores[:, strong])
    return Tradeoff("percent_to_stronger", curve, _singles(calls, test))


def price_curve(predicted: Values, scores: Values, costs: Values, mean_costs: Line) -> Curve:
    """Mean score against mean cost, from the cheapest model alone to the best prediction.

    At each price of a unit of cost, a prompt goes to the model with the highest prediction less its
    price. `mean_costs`, of shape [models], are known before an answer; `costs` are what it took.
    """
    dearest = max(float(mean_costs.max()), np.finfo(float).tiny)
    prices = np.logspace(-_PRICE_DECADES, _PRICE_DECADES, PRICES) / dearest
    rows = np.arange(len(scores))
    choices = [(predicted - price * mean_costs).argmax(axis=1) for price in (0.0, *prices)]
    found = np.array([(costs[rows, c].mean(), scores[rows, c].mean()) for c in choices])
    points = np.unique(found, axis=0)
    return Curve(points[:, 0], points[:, 1])


def _recovered(gain: Line, scores: Values) -> Recovered | None:
    weak, strong = (scores[:, model] for model in _weak_and_strong(scores))
    low, high = float(weak.mean()), float(strong.mean())
    if scores.shape[1] != 2 or low == high:
        return None
    return recovered(deferral_curve(gain, weak, strong), low, high)


def _weak_and_strong(scores: Values) -> tuple[int, int]:
    order = scores.mean(axis=0).argsort()
    return int(order[0]), int(order[-1])


def _singles(costs: Values, test: ScoreTable) -> dict[str, tuple[float, float]]:
    means = zip(costs.mean(axis=0).tolist(), test.scores.mean(axis=0).tolist(), strict=True)
    return dict(zip(test.models, means, strict=True))
