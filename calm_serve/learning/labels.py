"""Labels: several quality signals of an answer become one label and its weight."""

from __future__ import annotations

from collections.abc import Iterable

from calm_serve.types import FEEDBACK, VALIDATOR_PREFIX, QualitySignal

# Feedback comes from a person or a test that has the whole answer. A validator checks the form
# only: an answer that fails is certainly wrong; of those that pass, four in five are assumed to be
# right. The weights were chosen by hand; the unit tests compare with their names, not their sizes.
FEEDBACK_WEIGHT = 1.0
VALIDATOR_WEIGHT = 0.3
SHELL_WEIGHT = 0.1  # this validator checks little more than balanced quotes
PASSED_LABEL = 0.8
FAILED_BELOW = 0.5  # a validator's signal below this is a failure


def quality_label(signals: Iterable[QualitySignal]) -> tuple[float, float] | None:
    """Combine signals into (label in [0, 1], weight in (0, 1]); None without a signal.

    The latest feedback overrides validators. Otherwise one failing validator makes the label 0, and
    passing ones make it PASSED_LABEL. The weight depends on the source, never on the value: more
    weight for failures than for passes would bias P(success) downwards. Other sources are ignored.
    """
    all_signals = tuple(signals)
    feedback = [s for s in all_signals if s.source == FEEDBACK]
    if feedback:
        latest = max(feedback, key=lambda s: s.at)
        return min(max(latest.value, 0.0), 1.0), FEEDBACK_WEIGHT
    validators = [s for s in all_signals if s.source.startswith(VALIDATOR_PREFIX)]
    if not validators:
        return None
    weight = max(_weight(s) for s in validators)
    failed = any(s.value < FAILED_BELOW for s in validators)
    return (0.0 if failed else PASSED_LABEL), weight


def _weight(signal: QualitySignal) -> float:
    shell = signal.source == f"{VALIDATOR_PREFIX}shell"
    return SHELL_WEIGHT if shell else VALIDATOR_WEIGHT
