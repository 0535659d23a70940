"""How like an SLM's own words a prompt is: cosine over TF-IDF of hashed words.

It stands in for the sentence embedder of the CALM paper (arXiv 2602.03632, MiniLM), which this
project does not have and whose milliseconds no router here would pay: a context holds no text, but
the hashed words of the prompt (`RoutingContext.buckets`), and an SLM's description, skills and
example prompts are hashed the same way. An embedder knows that "flight" is like "travel"; hashed
words do not, so an SLM is worth as much here as its examples say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calm_serve.config import SLMSpec
from calm_serve.types import WORD_BUCKETS

Buckets = Sequence[int]  # sorted, unique
Reader = Callable[[str], Buckets]  # a text's buckets, as in `RoutingContext`


class Similarity:
    """Compares prompts with the texts of each SLM.

    An SLM's vector is the mean of its texts' unit vectors (Rocchio's centroid); the inverse
    document frequency is smoothed and counts every text once.
    """

    def __init__(self, specs: Sequence[SLMSpec], read: Reader) -> None:
        self._place = {spec.id: i for i, spec in enumerate(specs)}
        texts = [[_words(read(text)) for text in texts_of(spec)] for spec in specs]
        every = [words for own in texts for words in own]
        seen = np.zeros(WORD_BUCKETS)
        for words in every:
            seen[words] += 1.0
        self._idf = np.log((1.0 + len(every)) / (1.0 + seen)) + 1.0
        self._vectors = np.zeros((len(specs), WORD_BUCKETS))
        for vector, own in zip(self._vectors, texts, strict=True):
            for words in own:
                vector[words] += self._idf[words] / (_length(self._idf[words]) or 1.0)
            vector /= _length(vector) or 1.0

    def of(self, buckets: Buckets) -> Mapping[str, float]:
        """SLM id to cosine in [0, 1]; 0 for all when no word is known of the prompt."""
        words = _words(buckets)
        idf = self._idf[words]
        found = (self._vectors[:, words] @ idf) / (_length(idf) or 1.0)
        return dict(zip(self._place, found.tolist(), strict=True))


def texts_of(spec: SLMSpec) -> list[str]:
    """What the fleet file says about an SLM, one text for each statement."""
    return [f"{spec.description} {' '.join(spec.skills)}", *spec.examples]


def _words(buckets: Buckets) -> list[int]:
    return list(buckets[: bisect_left(buckets, WORD_BUCKETS)])


def _length(vector: NDArray[np.float64]) -> float:
    return float(np.sqrt(vector @ vector))
