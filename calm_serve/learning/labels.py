"""How several quality signals become one training label and its weight."""

from __future__ import annotations

from collections.abc import Iterable

from calm_serve.types import FEEDBACK, VALIDATOR_PREFIX, QualitySignal

# A person or a test who saw the answer is believed. A validator sees form only: a failure is
# certain, but of the answers that pass it we assume that four in five are right.
FEEDBACK_WEIGHT = 1.0
VALIDATOR_WEIGHT = 0.3
SHELL_WEIGHT = 0.1  # its check is little more than balanced quotes
PASSED_LABEL = 0.8


def quality_label(signals: Iterable[QualitySignal]) -> tuple[float, float] | None:
    """Combine signals into (label in [0, 1], weight in (0, 1]); None when nothing was said.

    The latest feedback overrides validators. Otherwise one failing validator makes the label 0 and
    passing ones make it PASSED_LABEL. The weight depends on who speaks and never on what was said:
    weighing failures more than passes would bend P(success) downwards. Other sources are ignored.
    """
    everything = tuple(signals)
    feedback = [s for s in everything if s.source == FEEDBACK]
    if feedback:
        latest = max(feedback, key=lambda s: s.at)
        return min(max(latest.value, 0.0), 1.0), FEEDBACK_WEIGHT
    validators = [s for s in everything if s.source.startswith(VALIDATOR_PREFIX)]
    if not validators:
        return None
    weight = max(_weight(s) for s in validators)
    failed = any(s.value < 0.5 for s in validators)
    return (0.0 if failed else PASSED_LABEL), weight


def _weight(signal: QualitySignal) -> float:
    shell = signal.source == f"{VALIDATOR_PREFIX}shell"
    return SHELL_WEIGHT if shell else VALIDATOR_WEIGHT
