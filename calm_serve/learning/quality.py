"""Recalibration: a factor per SLM that corrects P(success) by its last labels.

Retraining needs hundreds of labels and minutes; a broken SLM must lose its traffic within tens of
requests. `load_tests paper` notices a change of the constants here (broken_slm_drain_requests).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable

from calm_serve.learning.labels import FAILED_BELOW
from calm_serve.protocol.topics import UnfamiliarAnswers
from calm_serve.telemetry import Cusum, decay
from calm_serve.types import FEEDBACK, VALIDATOR_PREFIX, QualitySignal

# Number of labels that a factor is computed from. More give a steadier factor that follows a change
# later.
FACTOR_LABELS = 50
# Labels lose weight with time, because an SLM without traffic gets no new labels and would never
# regain it otherwise. While it is about to be chosen again, it gets about one request per
# half-life.
FACTOR_HALF_LIFE_S = 180.0
# Strength of the prior that the predictor is right, in expected successes.
PRIOR_SUCCESSES = 2.0
# Deviation that counts as chance and is subtracted, in standard deviations.
CHANCE_SIGMAS = 1.5
# The same after a detected fall, which is probably not chance. A larger value would send requests
# to a broken SLM; a smaller one would keep them for minutes from an SLM that has recovered.
FALLEN_SIGMAS = 0.75
# A failing SLM loses traffic for all prompts; success on some prompts is weaker evidence.
MIN_FACTOR, MAX_FACTOR = 0.05, 1.25
# A fall is detected when the labels are much more likely at this share of the usual success rate
# than at the usual rate. A rate that falls from 0.7 to 0 reaches the limit in 10 labels, one that
# falls from 0.9 in 5; an unchanged rate reaches it once in some 10,000 labels.
FALL_RATIO, FALL_LIMIT = 0.4, 8.0  # limit in nats
# After another change of the answers, such as their length, the limit is lower by this ratio for so
# many labels.
SUSPECTED_LABELS, SUSPECTED_LIMIT_RATIO = 50, 0.5
# A rise is detected when the labels are much more likely without the factor than with it. A false
# alarm costs a few requests.
RISE_LIMIT = 4.0  # nats
# A constant bias of the predictor is not a change. Its estimate is observed over predicted
# successes of about the last LEVEL_LABELS labels, with a prior of LEVEL_PRIOR expected successes.
LEVEL_LABELS, LEVEL_PRIOR, MAX_LEVEL = 300, 10.0, 1.5
# P(success) is taken to lie within these: a predictor that is certain may still be wrong.
MIN_VARIANCE_P, MAX_P = 0.05, 0.95  # for the variance of a label
MIN_LIKELIHOOD_P = 0.02  # for its likelihood

USUAL_LABELS = 500  # that the usual score of a stream is a mean of
MIN_USUAL_LABELS = 20  # with fewer there is no usual score yet
# Feedback counts as representative of all answers when at least this share of them gets some. The
# share is of the last 250 to 500 answers since the first feedback, plus PRIOR_ANSWERS, so that one
# feedback is not a share of 1.
REPRESENTATIVE_RATIO, PRIOR_ANSWERS = 0.2, 20.0
# While a stream's factor is below UNUSUAL_FACTOR, its answers change the usual score with a tenth
# of their weight.
UNUSUAL_FACTOR, UNUSUAL_WEIGHT = 0.8, 0.1

# The quality on unfamiliar prompts is a mean over about so many labels: one in ten of a guess's
# spread, and a generalist that breaks is noticed within as many.
UNFAMILIAR_LABELS = 100.0


class Recalibration:
    """Observed successes over predicted ones of one SLM, by which P(success) is multiplied.

    Posterior mean of a rate ratio under a Gamma(k, k) prior, as for standardised mortality ratios
    (Clayton and Kaldor, Biometrics 43, 1987): (k + observed) / (k + expected), after a deviation
    that chance explains was subtracted. A risk-adjusted cumulative sum of log likelihood ratios
    (Steiner et al., Biostatistics 1, 2000) finds when a fall began; earlier labels are dropped.
    """

    __slots__ = (
        "_clock",
        "_factor",
        "_fall",
        "_fallen",
        "_labels",
        "_level",
        "_rise",
        "_sums",
        "_suspected",
    )

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._labels: deque[tuple[float, float, float]] = deque(maxlen=FACTOR_LABELS)
        self._fall, self._rise = Cusum(0.0, FALL_LIMIT), Cusum(0.0, RISE_LIMIT)
        self._fallen = False
        self._suspected = 0  # labels left that need less evidence for a fall
        self._factor = 1.0
        self._level = _Level()
        # Time of the sums; then of the labels: expected successes, deviation, variance.
        self._sums = (0.0, 0.0, 0.0, 0.0)

    def suspect(self) -> None:
        """Expect a fall: the answers have changed in another way, such as their length."""
        self._suspected = SUSPECTED_LABELS

    def observe(self, predicted: float, label: float) -> float | None:
        """Count one answer; return a detected change (label less expectation), else None.

        Args:
            predicted: P(success) without the factor.
            label: score of the answer, in [0, 1].
        """
        self._labels.append((self._clock(), label, predicted))
        now = predicted * min(self._factor, 1.0)
        # Where the factor only reflects the constant bias, it must not be counted twice.
        expected = max(self._level.ratio, 1.0) * min(now, predicted * self._level.ratio)
        change = None
        # Both are always fed, because each counts the labels since its change began.
        limit_ratio = SUSPECTED_LIMIT_RATIO if self._suspected else 1.0
        self._suspected = max(self._suspected - 1, 0)
        fell = self._fall.add(
            _log_likelihood_ratio(FALL_RATIO * expected, expected, label), limit_ratio
        )
        rose = self._rise.add(_log_likelihood_ratio(predicted, now, label))
        if fell or rose:
            run = self._fall.run if fell else self._rise.run
            kept = list(self._labels)[-run:]
            self._labels = deque(kept, maxlen=FACTOR_LABELS)
            change = sum(y - p for _, y, p in kept) / run
            self._fallen = fell
        if not self._fallen:
            self._level.add(predicted, label)
        self._sums = self._summed()
        self._factor = self.factor()
        self._fallen = self._fallen and self._factor < 1.0
        return change

    def factor(self) -> float:
        """The factor now, in [MIN_FACTOR, MAX_FACTOR]; 1 without evidence."""
        at, expected, excess, variance = self._sums
        left = decay(self._clock() - at, FACTOR_HALF_LIFE_S)  # all labels fade alike
        sigmas = FALLEN_SIGMAS if self._fallen else CHANCE_SIGMAS
        certain = max(abs(excess) - sigmas * math.sqrt(variance), 0.0) * left
        factor = 1.0 + (certain if excess > 0.0 else -certain) / (PRIOR_SUCCESSES + expected * left)
        return min(max(factor, MIN_FACTOR), MAX_FACTOR)

    def _summed(self) -> tuple[float, float, float, float]:
        now = self._clock()
        expected = excess = variance = 0.0
        for at, label, predicted in self._labels:
            weight = decay(now - at, FACTOR_HALF_LIFE_S)
            expected += weight * predicted
            excess += weight * (label - predicted)
            p = min(max(predicted, MIN_VARIANCE_P), MAX_P)
            variance += weight * weight * p * (1.0 - p)
        return now, expected, excess, variance


def _log_likelihood_ratio(changed: float, expected: float, label: float) -> float:
    """Log likelihood of a label under the first P(success) less that under the second, in nats."""
    one, other = (min(max(p, MIN_LIKELIHOOD_P), MAX_P) for p in (changed, expected))
    return label * math.log(one / other) + (1.0 - label) * math.log((1.0 - one) / (1.0 - other))


class _Level:
    """Constant bias: observed over predicted successes, decayed over LEVEL_LABELS labels."""

    __slots__ = ("_expected", "_observed")

    def __init__(self) -> None:
        self._observed = self._expected = LEVEL_PRIOR

    @property
    def ratio(self) -> float:
        return min(self._observed / self._expected, MAX_LEVEL)

    def add(self, predicted: float, label: float) -> None:
        """Count a label."""
        keep = 1.0 - 1.0 / LEVEL_LABELS
        self._observed = keep * self._observed + label
        self._expected = keep * self._expected + predicted


class SLMQualityStream:
    """Scores of one SLM: feedback on predicted and on ruled answers, and validators.

    `clock` is monotonic, in seconds. `form_is_checked`: a validator reads every answer, so one
    without a validator's signal has passed; otherwise assumed from the first such signal on.
    """

    def __init__(self, clock: Callable[[], float], form_is_checked: bool = False) -> None:
        self._clock = clock
        self._usual_score, self._usual_expected = _Mean(), _Mean()
        self._ruled, self._form = _ComparedWithUsual(clock), _ComparedWithUsual(clock)
        # Answers since the first feedback, and those with feedback.
        self._answers, self._scored = PRIOR_ANSWERS, 0.0
        self.form_is_checked = form_is_checked
        self.forget_predictor()

    def forget_predictor(self) -> None:
        """Start anew what is compared with predictions, because another predictor decides."""
        self._feedback = Recalibration(self._clock)
        self._usual_score, self._usual_expected = _Mean(), _Mean()

    def suspect(self) -> None:
        """As `Recalibration.suspect`."""
        self._feedback.suspect()

    @property
    def factor(self) -> float:
        """Factor on P(success); below 1 when any stream is worse than expected."""
        feedback = self._feedback.factor()
        # A stream that is better than usual does not show that predictions are too low.
        usual = min(self._ruled.factor, self._form.factor, 1.0)
        return min(feedback, usual) if feedback < 1.0 else feedback * usual

    def answered(self, signals: Iterable[QualitySignal]) -> bool:
        """Count an answer with its validators' signals; True when a change was found."""
        self._answers += self._scored > 0.0
        if self._answers > USUAL_LABELS:
            self._answers, self._scored = self._answers / 2.0, self._scored / 2.0
        checks = [s.value for s in signals if s.source.startswith(VALIDATOR_PREFIX)]
        self.form_is_checked = self.form_is_checked or bool(checks)
        if not self.form_is_checked:
            return False
        return self._form.observe(float(all(value >= FAILED_BELOW for value in checks)))

    def scored(self, predicted: float | None, score: float) -> bool:
        """Count feedback on an answer; True when a change was found.

        `predicted` is P(success) without the factor, None where a rule named the SLM.
        """
        self._scored += 1.0
        if predicted is None:
            usual = self._ruled.usual
            changed = self._ruled.observe(score)
            # Fed to both: the first survives a predictor change, the second reacts faster, because
            # it gets all feedback.
            found = usual is not None and self._feedback.observe(usual, score) is not None
            return changed or found
        usual, expected = self._usual_score.value, self._usual_expected.value
        weight = UNUSUAL_WEIGHT if self._feedback.factor() < UNUSUAL_FACTOR else 1.0
        self._usual_score.add(score, weight)
        self._usual_expected.add(predicted, weight)
        if self._scored < REPRESENTATIVE_RATIO * self._answers:
            if self._usual_score.count <= MIN_USUAL_LABELS:
                return False
            predicted = min(predicted * usual / expected, 1.0) if expected > 0.0 else usual
        return self._feedback.observe(predicted, score) is not None


def feedback_score(signals: Iterable[QualitySignal]) -> float | None:
    """The latest feedback among signals, in [0, 1]; None without any."""
    feedback = [s for s in signals if s.source == FEEDBACK]
    return min(max(max(feedback, key=lambda s: s.at).value, 0.0), 1.0) if feedback else None


class UnfamiliarQuality:
    """Labels of one SLM's answers to unfamiliar prompts: their number and mean, both bounded.

    They are compared with no prediction, because none is trusted for such a prompt.
    """

    __slots__ = ("_answers", "_mean")

    def __init__(self) -> None:
        self._answers = self._mean = 0.0

    def add(self, score: float) -> None:
        """Count a score in [0, 1]."""
        self._answers = min(self._answers + 1.0, UNFAMILIAR_LABELS)
        self._mean += (score - self._mean) / self._answers

    def report(self) -> UnfamiliarAnswers | None:
        """The number of labels and their mean, None before the first one."""
        if not self._answers:
            return None
        return UnfamiliarAnswers(self._answers, round(self._mean, 3))


class _Mean:
    """A decaying mean over about the last USUAL_LABELS values."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float, weight: float = 1.0) -> None:
        """Count a value with a weight in (0, 1]."""
        self.count += 1
        self.value += weight * (value - self.value) / min(self.count, USUAL_LABELS)


class _ComparedWithUsual:
    """A stream of scores whose expectation is its own past mean."""

    __slots__ = ("_recalibration", "_usual")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._recalibration, self._usual = Recalibration(clock), _Mean()

    @property
    def factor(self) -> float:
        return self._recalibration.factor()

    @property
    def usual(self) -> float | None:
        """The usual score, None while it is not known."""
        return self._usual.value if self._usual.count >= MIN_USUAL_LABELS else None

    def observe(self, value: float) -> bool:
        """Count a score in [0, 1]; True when a change was found."""
        expected = self.usual
        self._usual.add(value, UNUSUAL_WEIGHT if self.factor < UNUSUAL_FACTOR else 1.0)
        return expected is not None and self._recalibration.observe(expected, value) is not None
