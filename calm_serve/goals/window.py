"""The last finished requests of one router as arrays, from which other choices are computed.

A row is a request. One that was scored keeps the predicted terms of every candidate, so that
another choice can be computed. Of all others (rules, pins, baselines) only the measurements count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calm_serve.routing import above_floor, reward, slo_penalty
from calm_serve.telemetry import ResidualEstimator, TotalRatio, decay
from calm_serve.types import SCORED_PATHS, Candidate, Decision, Outcome, Weights

# Four half-lives: what is older would have a sixteenth of all weight, and every row costs time in a
# step (decisions/0017). tests/unit/goals notices a quarter of it and four times as many.
ROWS = 192
# A row counts half as much after this many newer ones, so that requests since a shift prevail
# before they fill the window.
HALF_LIFE_ROWS = 48.0
TINY = 1e-9  # instead of 0 seconds or joules
# A pause would look like a low rate for a long time; gaps are cut at so many times the median.
GAP_LIMIT = 10.0

QUALITY, TTFT, E2E, ENERGY, FIXED = range(5)
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Terms:
    """The window's scored rows (n) and their candidates (c).

    `raw` holds the predictions, by which the selector decides. `ratio` corrects them per SLM.
    """

    raw: Array  # (5, n, c): QUALITY, TTFT, E2E, ENERGY, FIXED; 0 where there was no candidate
    valid: npt.NDArray[np.bool_]  # (n, c): the SLM was a candidate
    chosen: npt.NDArray[np.intp]  # (n,)
    measured: Array  # (3, n): TTFT, E2E, ENERGY; NaN where unknown
    weights: Array  # (n,): by age, with those of `rest` they sum to 1
    ratio: Array  # (3, c): measured over predicted
    spread: Array  # (2, c): of log(measured / corrected prediction), TTFT and E2E
    rest: Array  # (3, m): measured values of the other rows
    rest_weights: Array  # (m,)
    gap_s: float  # mean time between finished requests, NaN before there are two

    def reward(self, weights: Weights) -> Array:
        """Return the reward of each candidate, (n, c); without meaning where not `valid`."""
        value: Array = reward(weights, *self.raw)[0]
        return value


class GoalWindow:
    """A ring of the last ROWS finished requests; memory is bounded by ROWS x SLMs."""

    def __init__(self) -> None:
        self._slms: list[str] = []
        self._raw = np.zeros((5, ROWS, 0))
        self._valid = np.zeros((ROWS, 0), bool)
        self._chosen = np.full(ROWS, -1, np.intp)  # -1: not scored
        self._quality = np.full(ROWS, np.nan)
        self._measured = np.full((3, ROWS), np.nan)
        self._at = np.zeros(ROWS)
        self._residuals: list[_Residuals] = []  # in the order of `_slms`
        self.seen = 0

    @property
    def rows(self) -> int:
        """Requests in the window."""
        return min(self.seen, ROWS)

    @property
    def scored(self) -> int:
        """Requests in the window that were chosen by the weights."""
        return int(np.count_nonzero(self._chosen >= 0))

    def add(self, decision: Decision, outcome: Outcome, floor: float) -> None:
        """Add a finished request. `floor` is the goals' quality floor."""
        row = self.seen % ROWS
        self.seen += 1
        kept = [c for c in decision.candidates if c.prediction is not None]
        chosen = next((c for c in kept if c.slm_id == decision.slm_id), None)
        self._valid[row] = False
        self._raw[:, row] = 0.0
        self._chosen[row] = -1
        self._quality[row] = np.nan if chosen is None else chosen.quality
        self._at[row] = outcome.at
        self._measured[:, row] = np.nan
        if outcome.status == "ok":
            values = (outcome.timing.ttft_s, outcome.timing.e2e_s, outcome.engine.energy_j)
            self._measured[:, row] = [np.nan if v is None else max(v, TINY) for v in values]
        # After a failover the measurements are another SLM's and do not belong to this prediction.
        answered = outcome.slm_id == decision.slm_id
        if chosen is not None and answered and decision.path in SCORED_PATHS:
            self._add_candidates(row, decision, kept, floor)
            self._compare(row)

    def retain(self, slm_ids: Iterable[str]) -> None:
        """Forget SLMs that left; rows that chose one of them keep their measurements."""
        keep = [i for i, slm in enumerate(self._slms) if slm in set(slm_ids)]
        place = np.full(len(self._slms) + 1, -1, np.intp)  # index -1 is the last one
        place[keep] = range(len(keep))
        self._chosen = place[self._chosen]
        self._slms = [self._slms[i] for i in keep]
        self._raw, self._valid = self._raw[:, :, keep], self._valid[:, keep]
        self._residuals = [self._residuals[i] for i in keep]

    def measured(self) -> tuple[Array, Array, float]:
        """Return TTFT, E2E, energy (3, rows) and quality (rows,) of all requests, and the mean gap.

        Quality is as predicted. The gap between finished requests is in seconds.
        """
        order = self._newest_first()
        return self._measured[:, order], self._quality[order], self._gap_s(order)

    def terms(self) -> Terms:
        """Return the arrays from which other choices are computed."""
        order = self._newest_first()
        weights = _weights(len(order))
        weights /= weights.sum()
        is_scored = self._chosen[order] >= 0
        rows = order[is_scored]
        raw, chosen = self._raw[:, rows], self._chosen[rows]
        measured = self._measured[:, rows]
        return Terms(
            raw=raw,
            valid=self._valid[rows],
            chosen=chosen,
            measured=measured,
            weights=weights[is_scored],
            ratio=self._ratio(),
            spread=self._spread(),
            rest=self._measured[:, order[~is_scored]],
            rest_weights=weights[~is_scored],
            gap_s=self._gap_s(order),
        )

    def _add_candidates(
        self, row: int, decision: Decision, kept: list[Candidate], floor: float
    ) -> None:
        above = above_floor(kept, max(floor, decision.context.quality_floor))
        terms = [
            (
                c.quality,
                p.ttft_s,
                p.e2e_s,
                p.energy_j,
                c.switching + slo_penalty(decision.context.slo, p),
            )
            for c in above
            if (p := c.prediction) is not None
        ]
        columns = [self._column(c.slm_id) for c in above]
        self._valid[row, columns] = True
        self._raw[:, row, columns] = np.array(terms).T
        chosen = self._column(decision.slm_id)
        # An SLM below a floor that was raised since would not be chosen now.
        self._chosen[row] = chosen if self._valid[row, chosen] else -1

    def _compare(self, row: int) -> None:
        """Add the row's measurements to the residuals of the chosen SLM."""
        slm = self._chosen[row]
        if slm >= 0:
            predicted = self._raw[TTFT : ENERGY + 1, row, slm]
            self._residuals[slm].add(self._measured[:, row], predicted)

    def _ratio(self) -> Array:
        """Return measured over predicted, (3, c).

        The prior of an SLM is the mean of the SLMs, weighted by how much of theirs is measured.
        """
        if not self._residuals:
            return np.ones((3, 0))
        log, trust = np.array([r.logs() for r in self._residuals]).transpose(2, 1, 0)
        others = log.sum(axis=1) / np.maximum(trust.sum(axis=1), TINY)
        ratio: Array = np.exp(log + (1.0 - trust) * others[:, None])
        return ratio

    def _spread(self) -> Array:
        return np.array([r.spreads() for r in self._residuals]).T

    def _column(self, slm_id: str) -> int:
        if slm_id not in self._slms:
            self._slms.append(slm_id)
            self._residuals.append(_Residuals())
            self._raw = np.pad(self._raw, ((0, 0), (0, 0), (0, 1)))
            self._valid = np.pad(self._valid, ((0, 0), (0, 1)))
        return self._slms.index(slm_id)

    def _newest_first(self) -> npt.NDArray[np.intp]:
        return (self.seen - 1 - np.arange(self.rows)) % ROWS

    def _gap_s(self, order: npt.NDArray[np.intp]) -> float:
        if len(order) < 2:
            return float("nan")
        gaps = np.maximum(-np.diff(self._at[order]), 0.0)
        gaps = np.minimum(gaps, GAP_LIMIT * max(float(np.median(gaps)), 1e-6))
        return float(np.average(gaps, weights=_weights(len(gaps))))


def _weights(rows: int) -> Array:
    """Weights of rows, newest first."""
    return decay(np.arange(rows, dtype=np.float64), HALF_LIFE_ROWS)


class _Residuals:
    """Measured over predicted of one SLM, for the predictions in the window.

    The router's estimators (`telemetry.FleetStats`) cannot be used. They correct the predictions
    before they get here, and a replay has other predictions than those that were logged.
    """

    def __init__(self) -> None:
        self._times = ResidualEstimator(), ResidualEstimator()  # TTFT, E2E
        self._energy = TotalRatio()

    def add(self, measured: Array, predicted: Array) -> None:
        """Count an answer's TTFT, E2E and joules; NaN where nothing was measured."""
        for time, seen, expected in zip(self._times, measured[:2], predicted[:2], strict=True):
            if not np.isnan(seen):
                applied = time.at()
                time.add(float(seen / max(expected, TINY)) / applied, applied=applied)
        if not np.isnan(measured[2]):
            self._energy.add(float(measured[2]), max(float(predicted[2]), TINY))

    def logs(self) -> list[tuple[float, float]]:
        """Return log(ratio) and `trust` of TTFT, E2E and joules."""
        return [(each.log_at(), each.trust) for each in (*self._times, self._energy)]

    def spreads(self) -> list[float]:
        """Return the spreads of TTFT and E2E."""
        return [time.spread for time in self._times]
