"""Comparisons of champion and challenger: offline, in the shadow and after promotion.

The promotion test asks two questions on outcomes that neither was trained on. Does the challenger
predict better: the paired interval of the difference in log loss is above zero. Does it choose no
worse: the paired interval of the difference in doubly robust value is above -VALUE_TOLERANCE. The
second question needs MIN_EXPLORED explored rows, because the log otherwise holds almost no evidence
about other choices.

A challenger has a second rival, which reads no prompt and always takes the SLM of the best mean
label. With few labels it is hard to beat (decision 0045). The challenger must predict better than
the SLMs' means, and where explored rows tell, be valued no lower.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from calm_serve.learning.decision_log import (
    LoggedDecision,
    read_decision,
    redecide,
    rescore,
)
from calm_serve.learning.metrics import (
    Values,
    calibration_error,
    ci95,
    log_losses,
    normal_ci95,
    resampled,
)
from calm_serve.learning.off_policy import Estimate, PolicyLog, measured
from calm_serve.learning.shadow import ShadowTally
from calm_serve.learning.training import label_arrays, success_probabilities
from calm_serve.prediction import (
    Artifact,
    LightGBMPredictor,
    MetadataPrior,
    fits_layout,
    known_slms,
)
from calm_serve.protocol.topics import LiveComparison
from calm_serve.types import Candidate, Outcome

# Promotion test.
MIN_HOLDOUT = 10  # labelled outcomes; with fewer no interval is computed
MIN_EXPLORED = 20  # explored rows; with fewer the value of other choices is not tested
EXPLORED_PROPENSITY = 0.5  # a less likely choice was not the logged policy's own: it was explored
VALUE_TOLERANCE = 0.02  # loss of value that is accepted, in quality points per request

UNKNOWN_BASE_RATE = 0.5  # for an SLM unknown to an artifact that has no base rate either

# Post-promotion evaluation. `load_tests paper --changes` (swapped feedback) notices a change: it
# counts the requests until the rollback.
LIVE_LABELS = 500  # newest labelled outcomes that are compared
MIN_LIVE_LABELS = 30  # with fewer there is no verdict
CHECK_EVERY_LABELS = 25  # new labels between two comparisons, each of which reads LIVE_LABELS rows
# The comparison is repeated with every few labels, so "surely" is one in two thousand (one-sided).
SURE_SIGMAS = 3.3
# In a small sample without the mistakes to be expected, the more confident predictor has the lower
# loss, by little but on every row. So the difference must also matter: nats, on average.
LOSS_TOLERANCE = 0.1


class VerdictReason(StrEnum):
    """Why a challenger passed the promotion test or not."""

    BETTER = "better"
    NOT_BETTER = "not_better"  # the interval of the difference reaches zero
    TOO_FEW_HELD_OUT = "too_few_held_out"
    VALUE_MAY_FALL = "value_may_fall"  # predicts better, but may choose worse
    MEANS_AS_GOOD = "means_as_good"  # better than the champion, but not than the SLMs' means


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a promotion test: log losses in nats; a positive difference favours the challenger.

    The value is the reward of `off_policy` under the weights that each row was decided with.
    """

    publish: bool
    reason: VerdictReason
    champion_loss: float | None  # None when there was too little to compare
    challenger_loss: float | None
    difference_ci95: tuple[float, float] | None
    held_out: int
    value_difference: float | None = None  # None where no choice can be replayed
    value_difference_ci95: tuple[float, float] | None = None
    value_rows: int = 0
    explored: int = 0  # of the value's rows
    # The same two differences to the SLMs' means; None where they are no rival.
    means_difference_ci95: tuple[float, float] | None = None
    means_value_difference: float | None = None


def promotion_test(
    holdout: Sequence[Outcome],
    champion: Artifact | None,
    challenger: Artifact,
    *,
    base_rate: float,
    seed: int,
    means: Mapping[str, float] | None = None,
) -> Verdict:
    """Compare both on labelled outcomes that neither was trained on.

    Without a champion the challenger is compared with a constant `base_rate`, which is also used
    for an SLM that one of the two does not know. `means`, each SLM's mean label in training, are
    the second rival. The interval is a paired bootstrap percentile interval; equal input and seed
    give an equal verdict.
    """
    labels, weights = label_arrays(holdout)
    if champion is None:
        old = np.full(len(holdout), base_rate)
    else:
        old = success_probabilities(champion, holdout, base_rate)
    new = log_losses(labels, success_probabilities(challenger, holdout, base_rate))
    verdict = compare(log_losses(labels, old), new, weights, seed=seed)
    gain = value_gain(holdout, champion, challenger, means, seed=seed)
    enough = gain is not None and gain.explored >= MIN_EXPLORED
    if gain is not None:
        may_fall = enough and gain.estimate.ci95[0] <= -VALUE_TOLERANCE
        verdict = replace(
            _refused(verdict, VerdictReason.VALUE_MAY_FALL) if may_fall else verdict,
            value_difference=gain.estimate.value,
            value_difference_ci95=gain.estimate.ci95,
            value_rows=gain.rows,
            explored=gain.explored,
            means_value_difference=None if means is None else gain.over_means,
        )
    if means is None:
        return verdict
    constant = np.array([means.get(o.slm_id, base_rate) for o in holdout])
    beside = compare(log_losses(labels, constant), new, weights, seed=seed)
    lower = enough and gain is not None and gain.over_means < 0.0
    if lower or not beside.publish:
        verdict = _refused(verdict, VerdictReason.MEANS_AS_GOOD)
    return replace(verdict, means_difference_ci95=beside.difference_ci95)


def _refused(verdict: Verdict, reason: VerdictReason) -> Verdict:
    """The verdict with another reason against publication, if it was for it."""
    return replace(verdict, publish=False, reason=reason) if verdict.publish else verdict


def compare(champion: Values, challenger: Values, weights: Values, *, seed: int) -> Verdict:
    """The first question: from the losses of both on the same outcomes, in nats."""
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
    over_means: float = 0.0  # value over that of always taking the SLM of the best mean


def value_gain(
    outcomes: Sequence[Outcome],
    champion: Artifact | None,
    challenger: Artifact,
    means: Mapping[str, float] | None = None,
    *,
    seed: int,
) -> ValueGain | None:
    """The second question: value of what both would have chosen; None without a labelled choice.

    The challenger's predictions are the reward model, because it has predicted better. Without a
    champion the challenger is compared with the logged predictions. The goals' quality floor is not
    in the log and therefore ignored.
    """
    old = None if champion is None else LightGBMPredictor(champion, MetadataPrior())
    new = LightGBMPredictor(challenger, MetadataPrior())
    constant = {slm: (mean, None) for slm, mean in (means or {}).items()}
    log, explored = PolicyLog(["champion", "challenger", "means"]), 0
    for outcome in outcomes:
        logged = read_decision(outcome) if fits_layout(outcome) else None
        if logged is None or np.isnan(measured(outcome, logged.weights)["reward"]):
            continue
        ranked = _rescored(logged, new)
        choices = {
            "champion": redecide(logged, _rescored(logged, old), predictor=old),
            "challenger": redecide(logged, ranked, predictor=new),
            "means": redecide(logged, rescore(logged, values=constant)),
        }
        log.add(logged, ranked, choices, logged.weights)
        explored += outcome.decision.propensity < EXPLORED_PROPENSITY
    if not len(log):
        return None
    found = log.difference("reward", "challenger", "champion", seed=seed)
    over_means = log.difference("reward", "challenger", "means", seed=seed).value
    return ValueGain(found, len(log), explored, over_means)


def _rescored(logged: LoggedDecision, predictor: LightGBMPredictor | None) -> list[Candidate]:
    if predictor is None:
        return rescore(logged)
    outcome = logged.outcome
    return rescore(
        logged, values=predictor.of_prompt(outcome.features.numbers, outcome.features.buckets)
    )


def compare_live(
    outcomes: Sequence[Outcome], champion: Artifact, previous: Artifact
) -> LiveComparison | None:
    """Compare on the labelled `outcomes` that the champion predicted; None below MIN_LIVE_LABELS.

    Outcomes of an SLM that the champion does not know are left out: the prior or a cold-start
    booster predicted them. Weighted by label weight; the interval is the normal one of a weighted
    mean of paired differences.
    """
    known = known_slms(champion)
    own = [
        o
        for o in outcomes
        if o.decision.predicted
        and o.slm_id in known
        and fits_layout(o)
        and o.decision.versions.predictor.champion == champion.version
    ]
    if len(own) < MIN_LIVE_LABELS:
        return None
    labels, weights = label_arrays(own)
    predicted = np.array([p.success_ratio for o in own if (p := o.decision.predicted)])
    base_rate = float(previous.metrics.get("base_rate", UNKNOWN_BASE_RATE))
    previous_predicted = success_probabilities(previous, own, base_rate)
    losses, previous_losses = log_losses(labels, predicted), log_losses(labels, previous_predicted)
    gain = previous_losses - losses
    mean = float(np.average(gain, weights=weights))
    error = float(np.sqrt(np.sum((weights * (gain - mean)) ** 2)) / weights.sum())
    return LiveComparison(
        labelled=len(own),
        log_loss=float(np.average(losses, weights=weights)),
        previous_log_loss=float(np.average(previous_losses, weights=weights)),
        gain=mean,
        gain_ci95=normal_ci95(mean, error),
        calibration_error=calibration_error(labels, predicted, weights),
        previous_calibration_error=calibration_error(labels, previous_predicted, weights),
        surely_worse=mean < -LOSS_TOLERANCE and mean + SURE_SIGMAS * error < 0.0,
    )


def shadow_verdict(
    outcomes: Sequence[Outcome], champion: Artifact, challenger: Artifact
) -> Verdict:
    """The promotion test on labelled outcomes since the shadow began."""
    base_rate = float(champion.metrics.get("base_rate", UNKNOWN_BASE_RATE))
    rows = [o for o in outcomes if fits_layout(o)]
    return promotion_test(rows, champion, challenger, base_rate=base_rate, seed=0)


def objection(verdict: Verdict) -> str:
    """Why live answers speak against a challenger, "" when they do not."""
    loss, value = verdict.difference_ci95, verdict.value_difference_ci95
    if loss is not None and loss[1] < -LOSS_TOLERANCE:
        return "live log loss is worse"
    if verdict.explored >= MIN_EXPLORED and value is not None and value[1] < 0.0:
        return "its choices have a lower value"
    return ""


def shadow_note(tally: ShadowTally, verdict: Verdict) -> str:
    """The evidence of a shadow in one line."""
    parts = [f"shadow of {tally.requests} requests"]
    if tally.requests:
        parts.append(f"agreement {tally.agreed / tally.requests:.2f}")
    if verdict.difference_ci95 is not None:
        low, high = verdict.difference_ci95
        parts.append(f"log loss gain {low:+.3f} to {high:+.3f} on {verdict.held_out} labels")
    if verdict.value_difference_ci95 is not None:
        low, high = verdict.value_difference_ci95
        parts.append(f"value gain {low:+.3f} to {high:+.3f}")
    return ", ".join(parts)


class LabelledLog(Protocol):
    """The store of outcomes, as an evaluation reads it; both methods block."""

    def recent(self, limit: int, *, labelled: bool = False) -> list[Outcome]:
        """The newest `limit` outcomes, or `labelled` ones, oldest first."""
        ...

    def labelled_total(self) -> int:
        """Outcomes that ever got a label; it never falls."""
        ...


class PostPromotionEvaluation:
    """Compares the champion with its predecessor as labels arrive. Used from one event loop."""

    def __init__(
        self, store: LabelledLog, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    ) -> None:
        self._store, self._in_thread = store, in_thread
        self._found: LiveComparison | None = None
        self._checked_labels = 0
        self._champions = 0

    def begin(self) -> None:
        """Start anew: another champion was published."""
        self._found = None
        self._champions += 1

    async def check(self, champion: Artifact, previous: Artifact) -> LiveComparison | None:
        """Compare both on the newest labels; None when not due, or with too few labels."""
        total = await self._in_thread(self._store.labelled_total)
        if total - self._checked_labels < CHECK_EVERY_LABELS:
            return None
        self._checked_labels, evaluated = total, self._champions
        rows = await self._in_thread(lambda: self._store.recent(LIVE_LABELS, labelled=True))
        found = await asyncio.to_thread(compare_live, rows, champion, previous)
        if self._champions != evaluated:  # another one was published meanwhile
            return None
        self._found = found
        return found

    @property
    def latest(self) -> LiveComparison | None:
        """The last comparison, None before there was one."""
        return self._found
