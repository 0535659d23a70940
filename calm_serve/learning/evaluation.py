"""Champion against challenger on the newest outcomes: publish only what is surely better.

Two questions on outcomes that neither was trained on. Does it predict better: a paired interval of
the log loss, above zero. Does it then choose no worse: a paired interval of the doubly robust value
of both policies, above -VALUE_TOLERANCE; asked once enough of the rows were explored, because until
then the log hardly says anything about other choices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
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
    resampled,
)
from calm_serve.learning.off_policy import Estimate, PolicyLog, measured
from calm_serve.learning.shadow import ShadowTally
from calm_serve.learning.training import label_arrays, success_probabilities
from calm_serve.prediction import (
    SUCCESS,
    Artifact,
    LightGBMPredictor,
    MetadataPrior,
    fits_layout,
    own_head,
)
from calm_serve.protocol.topics import LiveComparison
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


def promotion_test(
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
        explored += outcome.decision.propensity < EXPLORED_PROPENSITY
    if not len(log):
        return None
    found = log.difference("reward", "challenger", "champion", seed=seed)
    return ValueGain(found, len(log), explored)


def _rescored(logged: LoggedDecision, predictor: LightGBMPredictor | None) -> list[Candidate]:
    if predictor is None:
        return rescore(logged)
    outcome = logged.outcome
    return rescore(
        logged, values=predictor.of_prompt(outcome.features.numbers, outcome.features.buckets)
    )


LIVE_LABELS = 500  # labelled outcomes
MIN_LABELLED = 30
# The question is asked again and again as labels come, so "surely" is one in two thousand.
SURE_SIGMAS = 3.3
# A small sample without the mistakes that are to be expected favours whoever is surest of itself,
# by little and very regularly. So a difference has to matter too: nats, on the mean.
LOSS_TOLERANCE = 0.1


def live_calibration(
    outcomes: Sequence[Outcome], champion: Artifact, previous: Artifact
) -> LiveComparison | None:
    """Compare on the labelled `outcomes` that the champion predicted; None below MIN_LABELLED.

    Those of an SLM that it does not know were predicted by somebody else under its version.
    Weighted by label weight; the interval is the normal one of a weighted mean of paired
    differences.
    """
    known = {s for s in champion.slm_ids if own_head(SUCCESS, s) in champion.boosters}
    mine = [
        o
        for o in outcomes
        if o.decision.predicted
        and o.slm_id in known
        and fits_layout(o)
        and o.decision.versions.predictor.champion == champion.version
    ]
    if len(mine) < MIN_LABELLED:
        return None
    labels, weights = label_arrays(mine)
    said = np.array([p.success_ratio for o in mine if (p := o.decision.predicted)])
    other = success_probabilities(previous, mine, float(previous.metrics.get("base_rate", 0.5)))
    losses, others = log_losses(labels, said), log_losses(labels, other)
    gain = others - losses
    mean = float(np.average(gain, weights=weights))
    error = float(np.sqrt(np.sum((weights * (gain - mean)) ** 2)) / weights.sum())
    return LiveComparison(
        labelled=len(mine),
        log_loss=float(np.average(losses, weights=weights)),
        previous_log_loss=float(np.average(others, weights=weights)),
        gain=mean,
        gain_ci95=(mean - 1.96 * error, mean + 1.96 * error),
        calibration_error=calibration_error(labels, said, weights),
        previous_calibration_error=calibration_error(labels, other, weights),
        surely_worse=mean < -LOSS_TOLERANCE and mean + SURE_SIGMAS * error < 0.0,
    )


def shadow_verdict(
    outcomes: Sequence[Outcome], champion: Artifact, challenger: Artifact
) -> Verdict:
    """Both on labelled outcomes since the shadow began, by the gate's two questions."""
    base_rate = float(champion.metrics.get("base_rate", 0.5))
    rows = [o for o in outcomes if fits_layout(o)]
    return promotion_test(rows, champion, challenger, base_rate=base_rate, seed=0)


def objection(verdict: Verdict) -> str:
    """What live answers say against a challenger, "" for nothing."""
    loss, value = verdict.difference_ci95, verdict.value_difference_ci95
    if loss is not None and loss[1] < -LOSS_TOLERANCE:
        return "live log loss is worse"
    if verdict.explored >= MIN_EXPLORED and value is not None and value[1] < 0.0:
        return "its choices are worth less"
    return ""


def shadow_note(tally: ShadowTally, verdict: Verdict) -> str:
    """The evidence in one line."""
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


CHECK_EVERY_LABELS = 25


class LabelledLog(Protocol):
    """What an evaluation asks of the store of outcomes; both methods block."""

    def recent(self, limit: int, *, labelled: bool = False) -> list[Outcome]:
        """The newest `limit` outcomes, or `labelled` ones, oldest first."""
        ...

    def labelled_total(self) -> int:
        """Outcomes that ever got a label; it never falls."""
        ...


class PostPromotionEvaluation:
    """What live answers said of the present champion so far. Used from one event loop."""

    def __init__(
        self, store: LabelledLog, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    ) -> None:
        self._store, self._in_thread = store, in_thread
        self._found: LiveComparison | None = None
        self._checked_labels = 0
        self._champions = 0

    def begin(self) -> None:
        """Another champion decides."""
        self._found = None
        self._champions += 1

    async def check(self, champion: Artifact, previous: Artifact) -> LiveComparison | None:
        """Compare both on the newest labels, if that is due; None if not, or with too few."""
        total = await self._in_thread(self._store.labelled_total)
        if total - self._checked_labels < CHECK_EVERY_LABELS:
            return None
        self._checked_labels, asked = total, self._champions
        rows = await self._in_thread(lambda: self._store.recent(LIVE_LABELS, labelled=True))
        found = await asyncio.to_thread(live_calibration, rows, champion, previous)
        if self._champions != asked:
            return None
        self._found = found
        return found

    @property
    def latest(self) -> LiveComparison | None:
        """The last comparison, None before there was one."""
        return self._found
