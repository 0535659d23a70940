"""How like an SLM's own words a prompt is: cosine over TF-IDF of hashed words.

It stands in for the sentence embedder of the CALM paper (arXiv 2602.03632, MiniLM), which this
project does not have and whose milliseconds no router here would pay: a context holds no text, but
the hashed words of the prompt (`RoutingContext.buckets`), and an SLM's description, skills and
example prompts are hashed the same way. An embedder knows that "flight" is like "travel"; hashed
words do not, so an SLM is worth as much here as its examples say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calm_serve.config import Fleet, SLMSpec
from calm_serve.routing.baselines import Baseline, Choice
from calm_serve.types import WORD_BUCKETS, Candidate, Outcome, RoutingContext, SLMState

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


# The paper tries 0.1 to 0.3 for latency and 0.1 to 0.2 for energy, one of them at a time.
LATENCY_WEIGHT = 0.1
ENERGY_WEIGHT = 0.1
WINDOW = 100  # requests, as the paper's monitor


class Paper(Baseline):
    """The score of the CALM paper (arXiv 2602.03632): likeness, and recent QoS of the SLM.

        score = (1 - similarity) + w_latency * latency + w_energy * energy, lowest first

    Latency and energy are means over the SLM's last `WINDOW` requests, with the lowest value
    in any window at 0 and the highest at 1; an SLM without a request yet is at 0, as in the paper.
    No queue, no prompt length and no learning. What stands in for its embedder: `similarity.py`.
    """

    def __init__(self, read: Reader) -> None:
        super().__init__()
        self._read = read
        self._similarity = Similarity((), read)
        self._windows: tuple[dict[str, deque[float]], ...] = ({}, {})  # latency, energy
        self._costs: dict[str, float] = {}

    def set_fleet(self, fleet: Fleet) -> None:
        """Follow SLMs that came or went, and read the descriptions again."""
        super().set_fleet(fleet)
        self._similarity = Similarity(fleet.slms, self._read)
        for windows in self._windows:
            for slm_id in windows.keys() - self._specs.keys():
                del windows[slm_id]
        self._weigh()

    def choose(
        self,
        context: RoutingContext,
        candidates: Sequence[Candidate],
        states: Mapping[str, SLMState],
    ) -> Choice:
        """Lowest score first."""
        del states
        like = self._similarity.of(context.features.buckets)
        scores = {c.slm_id: self._costs.get(c.slm_id, 0.0) - like[c.slm_id] for c in candidates}
        return sorted(scores, key=lambda i: (scores[i], i)), 1.0

    def observe(self, outcome: Outcome) -> None:
        """Take the latency and energy of an answer into the SLM's window."""
        if outcome.status != "ok" or outcome.slm_id not in self._specs:
            return
        for windows, value in zip(
            self._windows, (outcome.timing.e2e_s, outcome.engine.energy_j), strict=True
        ):
            if value is not None:
                windows.setdefault(outcome.slm_id, deque(maxlen=WINDOW)).append(value)
        self._weigh()

    def _weigh(self) -> None:
        weights = (LATENCY_WEIGHT, ENERGY_WEIGHT)
        self._costs = {}
        for weight, windows in zip(weights, self._windows, strict=True):
            low = min((min(w) for w in windows.values()), default=0.0)
            span = max((max(w) for w in windows.values()), default=0.0) - low or 1.0
            for slm_id, window in windows.items():
                cost = weight * (sum(window) / len(window) - low) / span
                self._costs[slm_id] = self._costs.get(slm_id, 0.0) + cost
