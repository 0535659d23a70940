"""Champion against challenger on the newest outcomes: publish only what is surely better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from calm_serve.analyze.lightgbm import Artifact
from calm_serve.knowledge.scores import Values, log_losses
from calm_serve.knowledge.trainer import label_arrays, success_probabilities
from calm_serve.types import Outcome

RESAMPLES = 1000
MIN_HOLDOUT = 10


class VerdictReason(StrEnum):
    """Why a challenger was published or not."""

    BETTER = "better"
    NOT_BETTER = "not_better"  # the interval of the difference reaches zero
    TOO_FEW_HELD_OUT = "too_few_held_out"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The comparison: log losses in nats; a positive difference favours the challenger."""

    publish: bool
    reason: VerdictReason
    champion_loss: float | None  # None when there was too little to compare
    challenger_loss: float | None
    difference_ci95: tuple[float, float] | None
    held_out: int


def judge(
    holdout: Sequence[Outcome],
    champion: Artifact | None,
    challenger: Artifact,
    *,
    base_rate: float,
    seed: int,
) -> Verdict:
    """Compare both on labelled outcomes that neither was trained on.

    Without a champion the opponent is the predictor that always says `base_rate`; the same value
    stands in for an SLM that one of the two does not know. The interval is a paired bootstrap
    percentile interval; equal input and seed give an equal verdict.
    """
    labels, weights = label_arrays(holdout)
    if champion is None:
        old = np.full(len(holdout), base_rate)
    else:
        old = success_probabilities(champion, holdout, base_rate)
    new = success_probabilities(challenger, holdout, base_rate)
    return compare(log_losses(labels, old), log_losses(labels, new), weights, seed=seed)


def compare(champion: Values, challenger: Values, weights: Values, *, seed: int) -> Verdict:
    """Decide from the losses of both on the same outcomes, in nats."""
    count = len(champion)
    if count < MIN_HOLDOUT:
        return Verdict(False, VerdictReason.TOO_FEW_HELD_OUT, None, None, None, count)
    gain = weights * (champion - challenger)
    random = np.random.default_rng(seed)
    differences = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = random.integers(count, size=count)
        differences[i] = gain[drawn].sum() / weights[drawn].sum()
    low, high = (float(x) for x in np.quantile(differences, (0.025, 0.975)))
    return Verdict(
        publish=low > 0.0,
        reason=VerdictReason.BETTER if low > 0.0 else VerdictReason.NOT_BETTER,
        champion_loss=float(np.average(champion, weights=weights)),
        challenger_loss=float(np.average(challenger, weights=weights)),
        difference_ci95=(low, high),
        held_out=count,
    )
