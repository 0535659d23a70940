"""What is said of one SLM's answers, against what was to be expected: one factor on P(success).

Three streams, because they are biased in different ways. Feedback is compared with P(success), as
long as it comes for a good part of the answers; who hears complaints only would else take every
SLM for broken, so rare feedback is compared with what was usual. So is feedback on answers that a
rule asked for, which nobody predicted. Validators mostly speak when an answer fails, so their
silence is a pass, and the share of failures among all answers is compared with what was usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from calm_serve.knowledge.labels import FEEDBACK, VALIDATOR_PREFIX
from calm_serve.telemetry import QualityCorrection
from calm_serve.types import QualitySignal

USUAL = 500  # labels behind what is usual
MIN_USUAL = 20
# Share of the answers with feedback from which on it is believed to be about all of them: of the
# last 250 to 500, counted since the first feedback, with a few in hand so that one is not all.
REPRESENTATIVE_RATIO, IN_HAND = 0.2, 20.0
# While a stream is below this factor its answers are not the usual ones, and hardly count as such:
# the mean follows them ten times as slowly.
UNUSUAL_FACTOR, UNUSUAL_PART = 0.8, 0.1


class SLMQuality:
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
        self._feedback = QualityCorrection(self._clock)
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
        self._correction, self._usual = QualityCorrection(clock), _Mean()

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
