"""Quantiles of latency, tokens and energy: mean predictions times calibrated ratios.

The predictor says means. What was observed over what was predicted, per SLM, turns a mean into a
quantile that holds for whatever the outcomes look like (split conformal prediction, Vovk et al.,
"Algorithmic Learning in a Random World", 2005, with the ratio as score). How often it holds is
counted, and corrected where it does not, so it goes on holding when the load changes (adaptive
conformal inference, Gibbs and Candes, NeurIPS 2021).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from calm_serve.types import Outcome, Prediction

KINDS = ("ttft_s", "e2e_s", "output_tokens", "energy_j")
WINDOW = 256
MIN_RATIOS = 20  # below it nothing is said
TARGET_RATIO = 0.95
# Step of the correction: six misses in a row widen the quantile as far as it goes.
GAIN = 0.01


class RatioQuantiles:
    """Observed over predicted of one SLM and kind: the last WINDOW ratios, sorted as they come."""

    __slots__ = ("_alpha", "_misses", "_order", "_sorted")

    def __init__(self) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._misses: deque[bool] = deque(maxlen=WINDOW)
        self._alpha = 1.0 - TARGET_RATIO  # the adapted share of misses, alpha_t

    def __len__(self) -> int:
        return len(self._order)

    def observe(self, ratio: float) -> None:
        """Count one ratio (above 0): first against the present p95, then as evidence."""
        if (limit := self.p95) is not None:
            missed = ratio > limit
            self._misses.append(missed)
            step = GAIN * ((1.0 - TARGET_RATIO) - missed)
            self._alpha = min(max(self._alpha + step, 0.0), 0.5)
        if len(self._order) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(ratio)
        insort(self._sorted, ratio)

    @property
    def p50(self) -> float | None:
        """Median ratio; None with fewer than MIN_RATIOS."""
        return self._quantile(0.5)

    @property
    def p95(self) -> float | None:
        """The ratio that TARGET_RATIO of the next ones stay below, as adapted."""
        return self._quantile(1.0 - self._alpha)

    @property
    def coverage_ratio(self) -> float | None:
        """Share of the last WINDOW outcomes at or below the p95 of their time."""
        if len(self._misses) < MIN_RATIOS:
            return None
        return 1.0 - sum(self._misses) / len(self._misses)

    def _quantile(self, share: float) -> float | None:
        count = len(self._sorted)
        if count < MIN_RATIOS:
            return None
        # The finite-sample rank; beyond the largest ratio seen there is nothing to say.
        return self._sorted[min(max(math.ceil((count + 1) * share), 1), count) - 1]


class Calibration:
    """`RatioQuantiles` of one SLM for each of KINDS."""

    def __init__(self) -> None:
        self.kinds = {kind: RatioQuantiles() for kind in KINDS}

    def observe(self, outcome: Outcome) -> None:
        """Count an answered request that was predicted; anything else is ignored."""
        for kind, ratio in ratios(outcome):
            self.kinds[kind].observe(ratio)

    def summary(self) -> dict[str, dict[str, float]]:
        """Kind -> {"p50", "p95": factors on the mean, "coverage_ratio"}; only what is known."""
        found = {}
        for kind, quantiles in self.kinds.items():
            values = {
                "p50": quantiles.p50,
                "p95": quantiles.p95,
                "coverage_ratio": quantiles.coverage_ratio,
            }
            if known := {k: round(v, 3) for k, v in values.items() if v is not None}:
                found[kind] = known
        return found


def ratios(outcome: Outcome) -> Iterator[tuple[str, float]]:
    """Observed over predicted for each of KINDS that the outcome has.

    Cold answers are left out: waking up is predicted apart and would widen everything.
    """
    if outcome.status != "ok" or outcome.cold or len(outcome.predicted) != 5:
        return
    predicted = Prediction(outcome.slm_id, *outcome.predicted)
    observed = {
        "ttft_s": outcome.ttft_s,
        "e2e_s": outcome.e2e_s,
        "output_tokens": float(outcome.output_tokens),
        "energy_j": outcome.energy_j,
    }
    for kind, value in observed.items():
        mean = getattr(predicted, kind)
        if value is not None and value > 0.0 and mean > 0.0:
            yield kind, value / mean


def quantiles(
    prediction: Mapping[str, Any], factors: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Kind -> {"p50", "p95"} in the kind's unit, for people and their dashboards.

    Args:
        prediction: fields of a `Prediction`.
        factors: what `Calibration.summary` says of its SLM.
    """
    mean = Prediction(**prediction)
    return {
        kind: {q: getattr(mean, kind) * found[q] for q in ("p50", "p95") if q in found}
        for kind, found in factors.items()
    }
