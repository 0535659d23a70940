"""The CALM paper's own policy, as a baseline."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from calm_serve.config import Fleet
from calm_serve.plan.baseline import Baseline, Choice
from calm_serve.plan.similarity import Reader, Similarity
from calm_serve.types import Candidate, Outcome, RoutingContext, SLMState

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
        like = self._similarity.of(context.buckets)
        scores = {c.slm_id: self._costs.get(c.slm_id, 0.0) - like[c.slm_id] for c in candidates}
        return sorted(scores, key=lambda i: (scores[i], i)), 1.0

    def observe(self, outcome: Outcome) -> None:
        """Take the latency and energy of an answer into the SLM's window."""
        if outcome.status != "ok" or outcome.slm_id not in self._specs:
            return
        for windows, value in zip(self._windows, (outcome.e2e_s, outcome.energy_j), strict=True):
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
