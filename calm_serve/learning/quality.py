"""A fast correction of P(success) for an SLM whose answers are not what was predicted.

Retraining needs hundreds of labels and minutes; a broken SLM must lose its traffic in tens of
requests. What the last labels say against their predictions becomes one factor per SLM.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable

from calm_serve.telemetry import Cusum
from calm_serve.types import FEEDBACK, VALIDATOR_PREFIX, QualitySignal

# Labels behind a factor. More would be steadier, but slower to follow.
FACTOR_LABELS = 50
# Old evidence fades by time: an SLM without traffic gets no new labels, and this is its way back.
# Near the point where it would win again it is sent about one request per half-life.
HALF_LIFE_S = 180.0
# Strength of the prior that the predictor is right, in expected successes.
PRIOR_SUCCESSES = 2.0
# Deviations that chance explains are left out: this many standard deviations.
CHANCE_SIGMAS = 1.5
# The same once a fall was found, which chance does not explain. More would let requests through to
# an SLM that is broken, less keeps them away for minutes from one that is well again.
FALLEN_SIGMAS = 0.75
# Whoever fails is held back everywhere; a success on some prompts says less about the others.
MIN_FACTOR, MAX_FACTOR = 0.05, 1.25
# A fall is looked for by how likely the labels are with this share of the usual successes. A usual
# 0.7 that becomes 0.0 sums up to the limit in 10 labels, a 0.9 in 5; chance needs some 10,000.
FALL_RATIO, FALL_LIMIT = 0.4, 8.0
# Whose answers have just changed in another way needs less evidence, for so many labels.
SUSPECTED_LABELS, SUSPECTED_PART = 50, 0.5
# A rise, by how likely they are without the correction. To be wrong here costs a few requests.
RISE_LIMIT = 4.0
# What the predictor always promises too much or too little is no change: the level of so many
# labels, with a prior as strong as so many expected successes.
LEVEL_LABELS, LEVEL_PRIOR, MAX_LEVEL = 300, 10.0, 1.5


class Recalibration:
    """Observed successes over predicted ones of one SLM, by which P(success) is multiplied.

    Posterior mean of a rate ratio under a Gamma(k, k) prior, as for standardised mortality ratios
    (Clayton and Kaldor, Biometrics 43, 1987): (k + observed) / (k + expected), after chance is
    taken off. A risk-adjusted cumulative sum of log likelihood ratios (Steiner et al.,
    Biostatistics 1, 2000) finds when a fall began and drops the labels before it.
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
        self._suspected = 0  # labels left for which less evidence is enough
        self._factor = 1.0
        self._level = _Level()
        # When summed up; then of the labels: expected successes, deviation, variance.
        self._sums = (0.0, 0.0, 0.0, 0.0)

    def suspect(self) -> None:
        """Its answers have changed in another way (length): a fall is likelier than usual."""
        self._suspected = SUSPECTED_LABELS

    def observe(self, predicted: float, label: float) -> float | None:
        """Count one answer; the change found (label less expectation, negative is worse), if any.

        Args:
            predicted: P(success) without this correction.
            label: what was said of the answer, in [0, 1].
        """
        self._labels.append((self._clock(), label, predicted))
        now = predicted * min(self._factor, 1.0)
        # A factor that only says what the level says is not to count twice.
        expected = max(self._level.ratio, 1.0) * min(now, predicted * self._level.ratio)
        change = None
        # Both are always fed: each one counts the run that it would cut to.
        part = SUSPECTED_PART if self._suspected else 1.0
        self._suspected = max(self._suspected - 1, 0)
        fell = self._fall.add(_evidence(FALL_RATIO * expected, expected, label), part)
        rose = self._rise.add(_evidence(predicted, now, label))
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
        at, expected, over, variance = self._sums
        left: float = 0.5 ** ((self._clock() - at) / HALF_LIFE_S)  # all of them fade alike
        sigmas = FALLEN_SIGMAS if self._fallen else CHANCE_SIGMAS
        sure = max(abs(over) - sigmas * math.sqrt(variance), 0.0) * left
        factor = 1.0 + (sure if over > 0.0 else -sure) / (PRIOR_SUCCESSES + expected * left)
        return min(max(factor, MIN_FACTOR), MAX_FACTOR)

    def _summed(self) -> tuple[float, float, float, float]:
        now = self._clock()
        expected = over = variance = 0.0
        for at, label, predicted in self._labels:
            weight = 0.5 ** ((now - at) / HALF_LIFE_S)
            expected += weight * predicted
            over += weight * (label - predicted)
            # A predictor that is certain may still be wrong.
            p = min(max(predicted, 0.05), 0.95)
            variance += weight * weight * p * (1.0 - p)
        return now, expected, over, variance


def _evidence(changed: float, expected: float, label: float) -> float:
    """Log likelihood of a label under one P(success), over that under another."""
    one, other = (min(max(p, 0.02), 0.95) for p in (changed, expected))
    return label * math.log(one / other) + (1.0 - label) * math.log((1.0 - one) / (1.0 - other))


class _Level:
    """Observed over predicted successes in the long run, at most MAX_LEVEL."""

    __slots__ = ("_expected", "_observed")

    def __init__(self) -> None:
        self._observed = self._expected = LEVEL_PRIOR

    @property
    def ratio(self) -> float:
        return min(self._observed / self._expected, MAX_LEVEL)

    def add(self, predicted: float, label: float) -> None:
        """Count a label; the oldest fade."""
        keep = 1.0 - 1.0 / LEVEL_LABELS
        self._observed = keep * self._observed + label
        self._expected = keep * self._expected + predicted


USUAL = 500  # labels behind what is usual
MIN_USUAL = 20
# Share of the answers with feedback from which on it is believed to be about all of them: of the
# last 250 to 500, counted since the first feedback, with a few in hand so that one is not all.
REPRESENTATIVE_RATIO, IN_HAND = 0.2, 20.0
# While a stream is below this factor its answers are not the usual ones, and hardly count as such:
# the mean follows them ten times as slowly.
UNUSUAL_FACTOR, UNUSUAL_PART = 0.8, 0.1


class SLMQualityStream:
    """All streams of one SLM.

    `clock` is monotonic, in seconds. `form_is_checked` says that a validator reads every answer;
    where that is not known, it begins when one first speaks.
    """

    def __init__(self, clock: Callable[[], float], form_is_checked: bool = False) -> None:
        self._clock = clock
        self._usual_score, self._usual_expected = _Mean(), _Mean()
        self._ruled, self._form = _AgainstUsual(clock), _AgainstUsual(clock)
        # Answers since somebody first judged one, and those that were judged.
        self._answers, self._scored = IN_HAND, 0.0
        self.form_is_checked = form_is_checked
        self.forget_predictor()

    def forget_predictor(self) -> None:
        """Another predictor decides now: what the last one got wrong is not its fault."""
        self._feedback = Recalibration(self._clock)
        self._usual_score, self._usual_expected = _Mean(), _Mean()

    def suspect(self) -> None:
        """Its answers have changed in another way: less evidence that they are wrong is enough."""
        self._feedback.suspect()

    @property
    def factor(self) -> float:
        """Factor on P(success); below 1 when any stream is worse than expected."""
        feedback = self._feedback.factor()
        # Better than usual says nothing of what was predicted.
        usual = min(self._ruled.factor, self._form.factor, 1.0)
        return min(feedback, usual) if feedback < 1.0 else feedback * usual

    def answered(self, signals: Iterable[QualitySignal]) -> bool:
        """Count an answer with what validators said of it; True when a change was found."""
        self._answers += self._scored > 0.0
        if self._answers > USUAL:
            self._answers, self._scored = self._answers / 2.0, self._scored / 2.0
        checks = [s.value for s in signals if s.source.startswith(VALIDATOR_PREFIX)]
        self.form_is_checked = self.form_is_checked or bool(checks)
        if not self.form_is_checked:
            return False
        return self._form.observe(float(all(value >= 0.5 for value in checks)))

    def scored(self, predicted: float | None, score: float) -> bool:
        """Count feedback on an answer; True when a change was found.

        `predicted` is P(success) without correction, None where a rule named the SLM.
        """
        self._scored += 1.0
        if predicted is None:
            usual = self._ruled.usual
            changed = self._ruled.observe(score)
            # Counted twice, because this stream outlives the predictor, and whoever breaks is found
            # sooner by all that is said of it.
            found = usual is not None and self._feedback.observe(usual, score) is not None
            return changed or found
        usual, expected = self._usual_score.value, self._usual_expected.value
        part = UNUSUAL_PART if self._feedback.factor() < UNUSUAL_FACTOR else 1.0
        self._usual_score.add(score, part)
        self._usual_expected.add(predicted, part)
        if self._scored < REPRESENTATIVE_RATIO * self._answers:
            if self._usual_score.count <= MIN_USUAL:
                return False
            predicted = min(predicted * usual / expected, 1.0) if expected > 0.0 else usual
        return self._feedback.observe(predicted, score) is not None


def feedback_score(signals: Iterable[QualitySignal]) -> float | None:
    """The latest feedback among signals, in [0, 1]; None without any."""
    given = [s for s in signals if s.source == FEEDBACK]
    return min(max(max(given, key=lambda s: s.at).value, 0.0), 1.0) if given else None


class _Mean:
    """A mean that forgets: over about the last USUAL values."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float, part: float = 1.0) -> None:
        """Count a value, or a part of one."""
        self.count += 1
        self.value += part * (value - self.value) / min(self.count, USUAL)


class _AgainstUsual:
    """A stream that is compared with its own past."""

    __slots__ = ("_correction", "_usual")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._correction, self._usual = Recalibration(clock), _Mean()

    @property
    def factor(self) -> float:
        return self._correction.factor()

    @property
    def usual(self) -> float | None:
        """The usual value, once it is known."""
        return self._usual.value if self._usual.count >= MIN_USUAL else None

    def observe(self, value: float) -> bool:
        """Count a value in [0, 1]; True when a change was found."""
        expected = self.usual
        self._usual.add(value, UNUSUAL_PART if self.factor < UNUSUAL_FACTOR else 1.0)
        return expected is not None and self._correction.observe(expected, value) is not None
