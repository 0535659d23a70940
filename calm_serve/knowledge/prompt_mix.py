"""Whether prompts are the usual ones: hashed words on one side, lengths and traits on the other."""

from __future__ import annotations

import math

from calm_serve.prediction import fits_layout
from calm_serve.requests import NUMBER_NAMES
from calm_serve.telemetry import PopulationShift
from calm_serve.types import Outcome

WORD_BINS = 32
LENGTH_BINS = 14  # by powers of 2 of the tokens
_TRAITS = tuple(
    NUMBER_NAMES.index(name)
    for name in (
        "shape_json",
        "shape_tools",
        "has_code",
        "has_system",
        "markers",
        "non_ascii_ratio",
    )
)


class PromptMix:
    """Two population stability indices over logged outcomes; 50 numbers each, any traffic."""

    def __init__(self) -> None:
        self._words = PopulationShift(WORD_BINS)
        self._shapes = PopulationShift(LENGTH_BINS + len(_TRAITS))

    def observe(self, outcome: Outcome) -> None:
        """Count one outcome's prompt; one without features is ignored."""
        if not outcome.buckets or not fits_layout(outcome):
            return
        self._words.add({b % WORD_BINS for b in outcome.buckets})
        length = int(math.log2(max(outcome.prompt_tokens, 1)))
        shapes = [min(length, LENGTH_BINS - 1)]
        shapes += (LENGTH_BINS + i for i, at in enumerate(_TRAITS) if outcome.numbers[at] > 0.05)
        self._shapes.add(shapes)

    def index(self) -> float:
        """The larger of the two indices; see `PopulationShift.index`."""
        return max(self._words.index(), self._shapes.index())
