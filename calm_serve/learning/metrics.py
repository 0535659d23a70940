"""Metrics of predicted probabilities: log loss, AUC, calibration error, and their intervals.

Labels may be soft, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

RESAMPLES = 1000  # of a bootstrap; a 95 % percentile interval needs some 25 beyond each end
# Of more than MANY_ROWS rows fewer resamples are drawn: the interval is narrow, so its ends may be
# less exact, and the time of a resample is proportional to the rows.
MANY_ROWS, FEWER_RESAMPLES = 20_000, 200
NORMAL_95 = 1.96  # standard errors on each side of a 95 % normal interval
POSITIVE_LABEL = 0.5  # a soft label of at least this is positive for the AUC
CALIBRATION_BINS = 10
# Probabilities are clipped so that one confident mistake cannot decide a comparison: a loss is at
# most -log(0.001), about 6.9 nats.
CLIP = 1e-3


def log_losses(labels: Values, predicted: Values) -> Values:
    """Cross-entropy of each prediction in nats, (n,) for labels and predictions of shape (n,).

    Probabilities are clipped to [CLIP, 1 - CLIP].
    """
    p = np.clip(predicted, CLIP, 1.0 - CLIP)
    losses: Values = -(labels * np.log(p) + (1.0 - labels) * np.log1p(-p))
    return losses


def log_loss(labels: Values, predicted: Values, weights: Values) -> float:
    """Weighted mean cross-entropy in nats."""
    return float(np.average(log_losses(labels, predicted), weights=weights))


def auc(labels: Values, predicted: Values, weights: Values) -> float | None:
    """Weighted area under the ROC curve; None when all labels are on one side of one half."""
    positive = labels >= POSITIVE_LABEL
    if positive.all() or not positive.any():
        return None
    order = np.argsort(predicted, kind="stable")
    values, starts = np.unique(predicted[order], return_index=True)
    del values
    wins = np.add.reduceat(np.where(positive, weights, 0.0)[order], starts)
    losses = np.add.reduceat(np.where(positive, 0.0, weights)[order], starts)
    below = np.cumsum(losses) - losses
    area = np.sum(wins * (below + 0.5 * losses))  # a tie counts half
    return float(area / (wins.sum() * losses.sum()))


def resampled(columns: Values, statistic: Callable[[Values], Values], *, seed: int) -> Values:
    """Bootstrap: `statistic` of the column sums of every resample.

    columns has shape (n, k); statistic maps sums of shape (resamples, k) to (resamples, m). Above
    MANY_ROWS rows fewer resamples are drawn. Equal input and seed give equal values.
    """
    random, count = np.random.default_rng(seed), len(columns)
    resamples = RESAMPLES if count <= MANY_ROWS else FEWER_RESAMPLES
    sums = np.empty((resamples, columns.shape[1]))
    for i in range(resamples):
        sums[i] = columns[random.integers(count, size=count)].sum(axis=0)
    return statistic(sums)


def ci95(values: Values) -> tuple[float, float]:
    """Percentile interval of resampled values of shape (resamples,)."""
    low, high = (float(x) for x in np.quantile(values, (0.025, 0.975)))
    return low, high


def normal_ci95(mean: float, standard_error: float) -> tuple[float, float]:
    """Normal interval of a mean."""
    return mean - NORMAL_95 * standard_error, mean + NORMAL_95 * standard_error


def calibration_error(labels: Values, predicted: Values, weights: Values) -> float:
    """Expected calibration error over equal-width bins, in [0, 1]."""
    bins = np.minimum((predicted * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=weights * (predicted - labels), minlength=CALIBRATION_BINS)
    return float(np.abs(gap).sum() / weights.sum())
