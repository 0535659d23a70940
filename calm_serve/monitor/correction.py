"""A fast correction of P(success) for an SLM whose answers are not what was predicted.

Retraining needs hundreds of labels and minutes; a broken SLM must lose its traffic in tens of
requests. What the last labels say against their predictions becomes one factor per SLM.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from calm_serve.monitor.drift import Cusum

# Labels behind a factor. More would be steadier, but slower to follow.
WINDOW = 50
# Old evidence fades by time: an SLM without traffic gets no new labels, and this is its way back.
# Near the point where it would win again it is sent about one request per half-life.
HALF_LIFE_S = 180.0
# Strength of the prior that the predictor is right, in expected successes.
PRIOR_SUCCESSES = 2.0
# Deviations that chance explains are left out: this many standard deviations.
CHANCE_SIGMAS = 1.5
# Whoever fails is held back everywhere; a success on some prompts says less about the others.
MIN_FACTOR, MAX_FACTOR = 0.05, 1.25
# A change of P(success) by more than the slack sums up to the limit in 7 labels when
# a 0.9 becomes 0.1; chance gets there about once in a thousand.
CHANGE_SLACK, CHANGE_LIMIT = 0.15, 5.0


class QualityCorrection:
    """Observed successes over predicted ones of one SLM, by which P(success) is multiplied.

    Posterior mean of a rate ratio under a Gamma(k, k) prior, as for standardised mortality ratios
    (Clayton and Kaldor, Biometrics 43, 1987): (k + observed) / (k + expected), after chance is
    taken off. A cumulative sum finds when a change began and drops the labels before it.
    """

    __slots__ = ("_clock", "_factor", "_fall", "_labels", "_rise")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._labels: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._fall, self._rise = (Cusum(CHANGE_SLACK, CHANGE_LIMIT) for _ in range(2))
        self._factor = 1.0

    def observe(self, predicted: float, label: float) -> float | None:
        """Count one answer; the change found (label less expectation, negative is worse), if any.

        Args:
            predicted: P(success) without this correction.
            label: what was said of the answer, in [0, 1].
        """
        self._labels.append((self._clock(), label, predicted))
        over = label - min(predicted * self._factor, 1.0)
        change = None
        # Both are always fed: each one counts the run that it would cut to.
        fell, rose = self._fall.add(-over), self._rise.add(over)
        if fell or rose:
            run = self._fall.run if fell else self._rise.run
            kept = list(self._labels)[-run:]
            self._labels = deque(kept, maxlen=WINDOW)
            change = sum(y - p for _, y, p in kept) / run
        self._factor = self.factor()
        return change

    def factor(self) -> float:
        """The factor now, in [MIN_FACTOR, MAX_FACTOR]; 1 without evidence."""
        now = self._clock()
        expected, over, variance = PRIOR_SUCCESSES, 0.0, 0.0
        for at, label, predicted in self._labels:
            weight = 0.5 ** ((now - at) / HALF_LIFE_S)
            expected += weight * predicted
            over += weight * (label - predicted)
            # A predictor that is certain may still be wrong.
            p = min(max(predicted, 0.05), 0.95)
            variance += weight * weight * p * (1.0 - p)
        sure = max(abs(over) - CHANCE_SIGMAS * math.sqrt(variance), 0.0)
        factor = 1.0 + (sure if over > 0.0 else -sure) / expected
        return min(max(factor, MIN_FACTOR), MAX_FACTOR)
