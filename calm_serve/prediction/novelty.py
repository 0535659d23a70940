"""Novelty: how unlike the training prompts a prompt is, by its words and pairs of words.

P(success) of a prompt unlike all that the predictor was trained on means little, and nothing in the
prediction shows it. So a bitmap remembers which hashes the training prompts had, before they are
folded into the buckets that the boosters read: those are too few, and all of them were seen. The
novelty of a prompt is the share of its hashes that are not in the bitmap. It reads what the
features read, the ends of the last user message, so its time does not grow with the prompt.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calm_serve.types import SEEN_BITS, Novelty

# `python -m load_tests routing` notices a change of these (novelty_auroc, novelty_worst_auroc and
# novelty_false_alarm_ratio).
SMOOTHING = 8.0  # hashes that count as seen in every prompt: one new name is no evidence yet
FALSE_ALARM_RATIO = 0.05  # of prompts like those of training, the share above the threshold
FOLDS = 50  # parts of the training prompts, each compared with the others
MIN_PROMPTS = 100  # distinct ones; with fewer the threshold is not known
# A bit is set when so many training prompts have it: what only one has is mostly a name.
MIN_COUNT = 2
# The more bits are set, the more new words have one by chance; beyond this share of all bits the
# least count rises. It is reached at some 10,000 distinct prompts.
MAX_SET_RATIO = 0.25

Counts = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SeenPrompts:
    """What an artifact keeps of its training prompts: a bitmap, and the threshold of novelty."""

    bitmap: bytes  # SEEN_BITS bits, the first one is the highest of the first byte
    threshold: float
    prompts: int  # distinct ones that both were learned from

    def to_plain(self) -> dict[str, Any]:
        """The record as JSON."""
        text = b64encode(self.bitmap).decode("ascii")
        return {"bitmap": text, "threshold": self.threshold, "prompts": self.prompts}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SeenPrompts:
        """Read `to_plain`. Raises ValueError, KeyError or TypeError for another record."""
        bitmap = b64decode(plain["bitmap"], validate=True)
        if len(bitmap) * 8 != SEEN_BITS:
            raise ValueError(f"a bitmap of {len(bitmap) * 8} bits, expected {SEEN_BITS}")
        return cls(bitmap, float(plain["threshold"]), int(plain["prompts"]))


class NoveltyDetector:
    """Compares prompts with the training prompts of an artifact."""

    def __init__(self, seen: SeenPrompts) -> None:
        bits = np.unpackbits(np.frombuffer(seen.bitmap, dtype=np.uint8))
        self._seen = bits.tobytes().__getitem__  # a byte for each bit: read in a tenth of the time
        self._threshold = seen.threshold

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        """Novelty of a prompt with these `PromptFeatures.bits`; None for a prompt without words."""
        if not bits:
            return None
        return Novelty(_ratio(len(bits) - sum(map(self._seen, bits)), len(bits)), self._threshold)


def fit_seen_prompts(prompts: Iterable[Sequence[int]]) -> SeenPrompts | None:
    """Learn the bitmap and the threshold from the `PromptFeatures.bits` of training prompts.

    The threshold is conformal (Vovk, Cross-conformal predictors, 2015): FOLDS parts, each compared
    with what the others set, so that every prompt is in the bitmap and in the calibration. Prompts
    come in the order of time, and a part is contiguous, because prompts of one conversation
    resemble each other. Equal prompts count once. None for fewer than MIN_PROMPTS distinct ones.
    """
    distinct = list(dict.fromkeys(tuple(bits) for bits in prompts if bits))
    if len(distinct) < MIN_PROMPTS:
        return None
    own: Counts = np.zeros((FOLDS, SEEN_BITS), dtype=np.int32)
    folds = [i * FOLDS // len(distinct) for i in range(len(distinct))]
    for bits, fold in zip(distinct, folds, strict=True):
        own[fold, list(bits)] += 1
    total: Counts = own.sum(axis=0, dtype=np.int32)
    least = _least_count(total)
    ratios = sorted(
        _ratio(int(np.count_nonzero(total[at] - own[fold, at] < least)), len(at))
        for at, fold in zip(map(list, distinct), folds, strict=True)
    )
    rank = math.ceil((len(ratios) + 1) * (1.0 - FALSE_ALARM_RATIO))
    threshold = ratios[min(rank, len(ratios)) - 1]
    return SeenPrompts(np.packbits(total >= least).tobytes(), threshold, len(distinct))


def _ratio(unseen: int, count: int) -> float:
    return unseen / (count + SMOOTHING)


def _least_count(total: Counts) -> int:
    """The count from which a bit is set: MIN_COUNT, or more to keep to MAX_SET_RATIO."""
    least = MIN_COUNT
    while np.count_nonzero(total >= least) > MAX_SET_RATIO * SEEN_BITS:
        least += 1
    return least
