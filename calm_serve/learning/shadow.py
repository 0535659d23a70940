"""Shadow mode: a challenger decides silently on live requests, and the difference is logged.

In the router, after the answer is out, `Shadow.compare` makes the logged decision again with the
challenger's predictions and writes the difference into the outcome. In the knowledge service,
`ShadowTally` adds the differences up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calm_serve.learning.decision_log import (
    PromptPredictor,
    read_decision,
    redecide,
    rescore,
)
from calm_serve.prediction import fits_layout
from calm_serve.types import Outcome

# About 0.2 ms each with six candidates, on the router's event loop: half a percent of it.
COMPARISONS_PER_S = 20.0


class Shadow:
    """A router's silent second opinion. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next_s = 0.0
        self.challenger: PromptPredictor | None = None

    def compare(self, outcome: Outcome, quality_floor: float = 0.0) -> None:
        """Add `extra["shadow"]` to the outcome of a scored request, at most COMPARISONS_PER_S.

        {"version", "slm_id": its choice, "agrees": with the present predictor's best, "success":
        its P(success) of the SLM chosen, "gain": score of its choice less that of the present
        predictor's, both by its own predictions}.
        """
        if self.challenger is None or self._clock() < self._next_s:
            return
        logged = read_decision(outcome)
        if logged is None or not fits_layout(outcome):
            return
        self._next_s = self._clock() + 1.0 / COMPARISONS_PER_S
        present = redecide(logged, rescore(logged), quality_floor)
        values = self.challenger.of_prompt(outcome.numbers, outcome.buckets)
        ranked = rescore(logged, values=values)
        choice = redecide(logged, ranked, quality_floor)
        score = {c.slm_id: c.score for c in ranked}
        quality = {c.slm_id: c.quality for c in ranked}
        outcome.extra["shadow"] = {
            "version": self.challenger.version,
            "slm_id": choice,
            "agrees": choice == present,
            "success": round(quality[logged.chosen], 6),
            "gain": round(score[choice] - score[present], 6),
        }


@dataclass(slots=True)
class ShadowTally:
    """What routers reported of one challenger."""

    version: str
    since: float  # Unix time in seconds: it has seen no outcome after this
    waiting_since: float  # the same, or when the first of those came that it replaced
    requests: int = 0
    agreed: int = 0
    gain: float = 0.0
    gain_squared: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count an outcome, if it holds this challenger's decision."""
        shadow = outcome.extra.get("shadow")
        if not isinstance(shadow, dict) or shadow.get("version") != self.version:
            return
        self.requests += 1
        self.agreed += bool(shadow["agrees"])
        self.gain += shadow["gain"]
        self.gain_squared += shadow["gain"] ** 2

    def report(self) -> dict[str, Any]:
        """Agreement, and the gain in score that the challenger itself expects, with its CI95."""
        n = self.requests
        if not n:
            return {"version": self.version, "requests": 0}
        mean = self.gain / n
        error = math.sqrt(max(self.gain_squared / n - mean * mean, 0.0) / n)
        return {
            "version": self.version,
            "requests": n,
            "agreement_ratio": self.agreed / n,
            "predicted_gain": mean,
            "predicted_gain_ci95": [mean - 1.96 * error, mean + 1.96 * error],
        }
