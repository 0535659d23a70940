"""What live answers say: against a challenger in the shadow, and of the champion on probation.

The gate looked at outcomes of the past, chosen by somebody else. On probation the champion answers
for what it predicted when it decided; the predecessor says what it would have predicted, from the
log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calm_serve.knowledge.gate import MIN_EXPLORED, Verdict, judge
from calm_serve.knowledge.holdout import label_arrays, success_probabilities
from calm_serve.knowledge.scores import calibration_error, log_losses
from calm_serve.knowledge.shadow import ShadowTally
from calm_serve.prediction import (
    SUCCESS,
    Artifact,
    fits_layout,
    own_head,
)
from calm_serve.types import Outcome

WINDOW = 500  # labelled outcomes
MIN_LABELLED = 30
# The question is asked again and again as labels come, so "surely" is one in two thousand.
SURE_SIGMAS = 3.3
# A small sample without the mistakes that are to be expected favours whoever is surest of itself,
# by little and very regularly. So a difference has to matter too: nats, on the mean.
LOSS_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Calibration:
    """Live log losses in nats and calibration errors; a positive gain favours the champion."""

    labelled: int
    log_loss: float
    previous_log_loss: float
    gain: float
    gain_ci95: tuple[float, float]
    calibration_error: float
    previous_calibration_error: float
    surely_worse: bool

    def reason(self, previous: str) -> str:
        """The comparison with `previous`, a version, in one line."""
        low, high = self.gain_ci95
        return (
            f"log loss {self.log_loss:.3f} against {self.previous_log_loss:.3f} that {previous} "
            f"would have had on {self.labelled} labelled outcomes (gain {self.gain:+.3f}, CI95 "
            f"{low:+.3f} to {high:+.3f}), calibration error {self.calibration_error:.3f} against "
            f"{self.previous_calibration_error:.3f}"
        )


def live_calibration(
    outcomes: Sequence[Outcome], champion: Artifact, previous: Artifact
) -> Calibration | None:
    """Compare on the labelled `outcomes` that the champion predicted; None below MIN_LABELLED.

    Those of an SLM that it does not know were predicted by somebody else under its version.
    Weighted by label weight; the interval is the normal one of a weighted mean of paired
    differences.
    """
    known = {s for s in champion.slm_ids if own_head(SUCCESS, s) in champion.boosters}
    mine = [
        o
        for o in outcomes
        if o.predicted
        and o.slm_id in known
        and fits_layout(o)
        and o.versions[0].partition("+")[0] == champion.version
    ]
    if len(mine) < MIN_LABELLED:
        return None
    labels, weights = label_arrays(mine)
    said = np.array([o.predicted[0] for o in mine])
    other = success_probabilities(previous, mine, float(previous.metrics.get("base_rate", 0.5)))
    losses, others = log_losses(labels, said), log_losses(labels, other)
    gain = others - losses
    mean = float(np.average(gain, weights=weights))
    error = float(np.sqrt(np.sum((weights * (gain - mean)) ** 2)) / weights.sum())
    return Calibration(
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
    return judge(rows, champion, challenger, base_rate=base_rate, seed=0)


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
