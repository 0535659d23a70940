"""The CALM paper's selection policy (arXiv 2602.03632): prompt similarity and recent QoS.

The paper embeds sentences (MiniLM), which takes milliseconds per request, and a `RoutingContext`
has no text. In its place similarity is the cosine of TF-IDF vectors over hashed words: those of the
prompt (`RoutingContext.buckets`) and those of an SLM's description, skills and example prompts. An
embedder relates "flight" to "travel"; hashed words do not, so similarity depends on the examples.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calm_serve.config import Fleet, SLMSpec
from calm_serve.routing.baselines import Baseline, Choice
from calm_serve.types import (
    FIRST_PAIR,
    FIRST_WORD,
    WORD_BUCKETS,
    Candidate,
    Outcome,
    RoutingContext,
    SLMState,
)

Buckets = Sequence[int]  # sorted, unique
Reader = Callable[[str], Buckets]  # a text's buckets, as in `RoutingContext`


class Similarity:
    """Cosine similarity of prompts with the texts of each SLM.

    An SLM's vector is the mean of its texts' unit vectors (Rocchio's centroid); the inverse
    document frequency is smoothed and counts every text once.
    """

    def __init__(self, specs: Sequence[SLMSpec], read: Reader) -> None:
        self._ids = [spec.id for spec in specs]
        texts = [[_words(read(text)) for text in texts_of(spec)] for spec in specs]
        documents = [words for own in texts for words in own]
        frequency = np.zeros(WORD_BUCKETS)
        for words in documents:
            frequency[words] += 1.0
        self._idf = np.log((1.0 + len(documents)) / (1.0 + frequency)) + 1.0
        self._vectors = np.zeros((len(specs), WORD_BUCKETS))
        for vector, own in zip(self._vectors, texts, strict=True):
            for words in own:
                vector[words] += self._idf[words] / (_length(self._idf[words]) or 1.0)
            vector /= _length(vector) or 1.0

    def of(self, buckets: Buckets) -> Mapping[str, float]:
        """Return SLM id to cosine in [0, 1]; 0 for all when the prompt has no words."""
        words = _words(buckets)
        idf = self._idf[words]
        cosines = (self._vectors[:, words] @ idf) / (_length(idf) or 1.0)
        return dict(zip(self._ids, cosines.tolist(), strict=True))


def texts_of(spec: SLMSpec) -> list[str]:
    """Return an SLM's texts in the fleet file: description with skills, then each example."""
    return [f"{spec.description} {' '.join(spec.skills)}", *spec.examples]


def _words(buckets: Buckets) -> list[int]:
    return [bucket - FIRST_WORD for bucket in buckets[: bisect_left(buckets, FIRST_PAIR)]]


def _length(vector: NDArray[np.float64]) -> float:
    return float(np.sqrt(vector @ vector))


# The paper tries 0.1 to 0.3 for latency and 0.1 to 0.2 for energy, one of them at a time.
LATENCY_WEIGHT = 0.1
ENERGY_WEIGHT = 0.1
WINDOW = 100  # requests, as the paper's monitor


class CalmPaper(Baseline):
    """The score of the CALM paper (arXiv 2602.03632): similarity, and recent QoS of the SLM.

        score = (1 - similarity) + w_latency * latency + w_energy * energy, lowest first

    Latency and energy are means over the SLM's last `WINDOW` requests, scaled so that the lowest
    value in any window is 0 and the highest is 1; an SLM without requests has 0, as in the paper.
    No queue, no prompt length and no learning.
    """

    def __init__(self, read: Reader) -> None:
        super().__init__()
        self._read = read
        self._similarity = Similarity((), read)
        self._windows: tuple[dict[str, deque[float]], ...] = ({}, {})  # latency, energy
        self._costs: dict[str, float] = {}

    def set_fleet(self, fleet: Fleet) -> None:
        """Swap the fleet and rebuild the similarity index."""
        super().set_fleet(fleet)
        self._similarity = Similarity(fleet.slms, self._read)
        for windows in self._windows:
            for slm_id in windows.keys() - self._specs.keys():
                del windows[slm_id]
        self._update_costs()

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Lowest score first."""
        del states
        similarity = self._similarity.of(context.features.buckets)
        costs = self._costs
        scores = {c.slm_id: costs.get(c.slm_id, 0.0) - similarity[c.slm_id] for c in candidates}
        return sorted(scores, key=lambda i: (scores[i], i)), 1.0

    def observe(self, outcome: Outcome) -> None:
        """Add the latency and energy of an answer to the SLM's windows."""
        if outcome.status != "ok" or outcome.slm_id not in self._specs:
            return
        for windows, value in zip(
            self._windows, (outcome.timing.e2e_s, outcome.engine.energy_j), strict=True
        ):
            if value is not None:
                windows.setdefault(outcome.slm_id, deque(maxlen=WINDOW)).append(value)
        self._update_costs()

    def _update_costs(self) -> None:
        weights = (LATENCY_WEIGHT, ENERGY_WEIGHT)
        self._costs = {}
        for weight, windows in zip(weights, self._windows, strict=True):
            low = min((min(w) for w in windows.values()), default=0.0)
            span = max((max(w) for w in windows.values()), default=0.0) - low or 1.0
            for slm_id, window in windows.items():
                cost = weight * (sum(window) / len(window) - low) / span
                self._costs[slm_id] = self._costs.get(slm_id, 0.0) + cost
