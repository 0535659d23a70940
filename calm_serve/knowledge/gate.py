"""Champion against challenger on the newest outcomes: publish only what is surely better.

Two questions on outcomes that neither was trained on. Does it predict better: a paired interval of
the log loss, above zero. Does it then choose no worse: a paired interval of the doubly robust value
of both policies, above -VALUE_TOLERANCE; asked once enough of the rows were explored, because until
then the log hardly says anything about other choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from calm_serve.knowledge.decisions import LoggedDecision, read_decision, redecide, rescore
from calm_serve.knowledge.evaluation import Estimate, PolicyLog, measured
from calm_serve.knowledge.holdout import label_arrays, success_probabilities
from calm_serve.knowledge.scores import Values, ci95, log_losses, resampled
from calm_serve.prediction import Artifact, LightGBMPredictor, MetadataPrior, fits_layout
from calm_serve.types import Candidate, Outcome

MIN_HOLDOUT = 10
MIN_EXPLORED = 20  # rows below which the log says too little about other choices
EXPLORED_PROPENSITY = 0.5  # a choice less likely than this was not the logged policy's own
VALUE_TOLERANCE = 0.02  # quality points a request


class VerdictReason(StrEnum):
    """Why a challenger was published or not."""

    BETTER = "better"
    NOT_BETTER = "not_better"  # the interval of the difference reaches zero
    TOO_FEW_HELD_OUT = "too_few_held_out"
    VALUE_MAY_FALL = "value_may_fall"  # predicts better, but may choose worse


@dataclass(frozen=True, slots=True)
class Verdict:
    """The comparison: log losses in nats; a positive difference favours the challenger.

    The value is the reward of `evaluation` under the weights that each row was decided with.
    """

    publish: bool
    reason: VerdictReason
    champion_loss: float | None  # None when there was too little to compare
    challenger_loss: float | None
    difference_ci95: tuple[float, float] | None
    held_out: int
    value_difference: float | None = None  # None where no choice can be made again from the log
    value_difference_ci95: tuple[float, float] | None = None
    value_rows: int = 0
    explored: int = 0  # of the value's rows


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
    verdict = compare(log_losses(labels, old), log_losses(labels, new), weights, seed=seed)
    gain = value_gain(holdout, champion, challenger, seed=seed)
    if gain is None:
        return verdict
    sure = gain.explored >= MIN_EXPLORED
    falls = sure and gain.estimate.ci95[0] <= -VALUE_TOLERANCE
    return replace(
        verdict,
        publish=verdict.publish and not falls,
        reason=VerdictReason.VALUE_MAY_FALL if verdict.publish and falls else verdict.reason,
        value_difference=gain.estimate.value,
        value_difference_ci95=gain.estimate.ci95,
        value_rows=gain.rows,
        explored=gain.explored,
    )


def compare(champion: Values, challenger: Values, weights: Values, *, seed: int) -> Verdict:
    """Decide from the losses of both on the same outcomes, in nats."""
    count = len(champion)
    if count < MIN_HOLDOUT:
        return Verdict(False, VerdictReason.TOO_FEW_HELD_OUT, None, None, None, count)
    columns = np.stack([weights * (champion - challenger), weights], axis=1)
    low, high = ci95(resampled(columns, lambda sums: sums[:, 0] / sums[:, 1], seed=seed))
    return Verdict(
        publish=low > 0.0,
        reason=VerdictReason.BETTER if low > 0.0 else VerdictReason.NOT_BETTER,
        champion_loss=float(np.average(champion, weights=weights)),
        challenger_loss=float(np.average(challenger, weights=weights)),
        difference_ci95=(low, high),
        held_out=count,
    )


@dataclass(frozen=True, slots=True)
class ValueGain:
    """Doubly robust value of the challenger's choices less the champion's, and its support."""

    estimate: Estimate
    rows: int
    explored: int


def value_gain(
    outcomes: Sequence[Outcome], champion: Artifact | None, challenger: Artifact, *, seed: int
) -> ValueGain | None:
    """Compare what both would have chosen; None without a labelled, logged choice.

    The challenger's predictions are the reward model: it is asked after it has predicted better.
    Without a champion the other policy are the predictions that were logged. Goals' own quality
    floor is not in the log and left out.
    """
    old = None if champion is None else LightGBMPredictor(champion, MetadataPrior())
    new = LightGBMPredictor(challenger, MetadataPrior())
    log, explored = PolicyLog(["champion", "challenger"]), 0
    for outcome in outcomes:
        logged = read_decision(outcome) if fits_layout(outcome) else None
        if logged is None or np.isnan(measured(outcome, logged.weights)["reward"]):
            continue
        ranked = _rescored(logged, new)
        choices = {
            "champion": redecide(logged, _rescored(logged, old)),
            "challenger": redecide(logged, ranked),
        }
        log.add(logged, ranked, choices, logged.weights)
        explored += outcome.propensity < EXPLORED_PROPENSITY
    if not len(log):
        return None
    found = log.difference("reward", "challenger", "champion", seed=seed)
    return ValueGain(found, len(log), explored)


def _rescored(logged: LoggedDecision, predictor: LightGBMPredictor | None) -> list[Candidate]:
    if predictor is None:
        return rescore(logged)
    outcome = logged.outcome
    return rescore(logged, values=predictor.of_prompt(outcome.numbers, outcome.buckets))
