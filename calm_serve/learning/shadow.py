"""Shadow: a challenger decides silently on live requests, and the difference is logged.

In the router, after the reply has been sent, `Shadow.compare` repeats the logged decision with the
challenger's predictions, and the outcome keeps the difference. In the knowledge actor `ShadowTally`
adds the differences up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from calm_serve.learning.decision_log import (
    PromptPredictor,
    read_decision,
    redecide,
    rescore,
)
from calm_serve.learning.metrics import normal_ci95
from calm_serve.prediction import fits_layout
from calm_serve.protocol.topics import ShadowReport
from calm_serve.types import Outcome, ShadowChoice

# Upper limit. A comparison takes about 0.2 ms with six candidates, so at most half a percent of the
# time of the router's event loop.
COMPARISONS_PER_S = 20.0


class Shadow:
    """A router's side of the shadow. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next_s = 0.0
        self.challenger: PromptPredictor | None = None

    def compare(
        self, outcome: Outcome, quality_floor: float = 0.0, default_slm: str = ""
    ) -> ShadowChoice | None:
        """The challenger's choice for a scored request; the last two are of the goals.

        None without a challenger, for requests that were not scored, and above COMPARISONS_PER_S.
        """
        if self.challenger is None or self._clock() < self._next_s:
            return None
        logged = read_decision(outcome)
        if logged is None or not fits_layout(outcome):
            return None
        self._next_s = self._clock() + 1.0 / COMPARISONS_PER_S
        again = partial(redecide, quality_floor=quality_floor, default_slm=default_slm)
        present = again(logged, rescore(logged))
        values = self.challenger.of_prompt(outcome.features.numbers, outcome.features.buckets)
        ranked = rescore(logged, values=values)
        choice = again(logged, ranked, predictor=self.challenger)
        score = {c.slm_id: c.score for c in ranked}
        quality = {c.slm_id: c.quality for c in ranked}
        return ShadowChoice(
            version=self.challenger.version.champion,
            slm_id=choice,
            agrees=choice == present,
            success_ratio=round(quality[logged.chosen], 6),
            gain=round(score[choice] - score[present], 6),
        )


@dataclass(slots=True)
class ShadowTally:
    """Sum of the comparisons that routers logged for one challenger."""

    version: str
    since: float  # Unix time in seconds; no later outcome was used to train it
    waiting_since: float  # `since` of the first of the challengers that replaced one another
    requests: int = 0
    agreed: int = 0
    gain: float = 0.0
    gain_squared: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count an outcome that has a choice of this challenger."""
        shadow = outcome.decision.shadow
        if shadow is None or shadow.version != self.version:
            return
        self.requests += 1
        self.agreed += shadow.agrees
        self.gain += shadow.gain
        self.gain_squared += shadow.gain**2

    def report(self) -> ShadowReport:
        """Agreement, and the mean gain in score by the challenger's own predictions, with CI95."""
        n = self.requests
        if not n:
            return ShadowReport(self.version, 0)
        mean = self.gain / n
        error = math.sqrt(max(self.gain_squared / n - mean * mean, 0.0) / n)
        return ShadowReport(self.version, n, self.agreed / n, mean, normal_ci95(mean, error))
