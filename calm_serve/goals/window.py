"""The last requests of one router as arrays: what each candidate would have meant for the goals.

A row is a finished request. Scored ones keep every candidate's predicted terms, so that another
choice can be computed; of all others (rules, pins, baselines) only what was measured counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calm_serve.routing import above_floor, reward, slo_penalty
from calm_serve.types import SCORED_PATHS, Candidate, Decision, Outcome, Weights

ROWS = 192
# A row counts half as much after this many newer ones, so a shift is mostly what is seen well
# before it is all that is in the window.
HALF_LIFE_ROWS = 48.0
# Measured over predicted, by SLM: half of it is from its last 8 answers, of joules from its last 16
# because all of them tell a mean. It fades slowly while the SLM gets no requests, or it would be
# tried again as soon as it had left the window.
TIME_KEEP, JOULE_KEEP, IDLE_KEEP = 0.5 ** (1 / 8), 0.5 ** (1 / 16), 0.5 ** (1 / 1024)
RATIO_PRIOR_ROWS = 2.0  # weight of "the predictions are right"
TINY = 1e-9  # instead of 0 seconds or joules
MIN_SPREAD, PRIOR_SPREAD = 0.05, 0.2  # of the logarithm of measured over predicted
# A pause would look like a low rate for a long time; gaps are cut at so many times the median.
GAP_LIMIT = 10.0

QUALITY, TTFT, E2E, ENERGY, FIXED = range(5)
# Decayed sums by SLM: answers with a measured TTFT, E2E and energy, and what was measured of them.
_EVIDENCE = ("ttft", "e2e", "energy", "log_ttft", "log_e2e", "joules", "predicted_joules")
_OF_JOULES = ("energy", "joules", "predicted_joules")
_KEEP = np.array([JOULE_KEEP if n in _OF_JOULES else TIME_KEEP for n in _EVIDENCE])
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Terms:
    """The window's scored rows (n) by candidate (c), as the goals see them.

    `raw` holds the predictions, which decide; `ratio` corrects them, by SLM, to what is measured.
    """

    raw: Array  # (5, n, c): QUALITY, TTFT, E2E, ENERGY, FIXED; 0 where there was no candidate
    valid: npt.NDArray[np.bool_]  # (n, c): the SLM was a candidate
    chosen: npt.NDArray[np.intp]  # (n,)
    measured: Array  # (3, n): TTFT, E2E, ENERGY; NaN where unknown
    weights: Array  # (n,): by age, with those of `rest` they sum to 1
    ratio: Array  # (3, c): measured over predicted
    spread: Array  # (2,): of log(measured / corrected prediction), TTFT and E2E
    rest: Array  # (3, m): measured values of the other rows
    rest_weights: Array  # (m,)
    gap_s: float  # mean time between finished requests, NaN before there are two

    def reward(self, weights: Weights) -> Array:
        """The score of each candidate under `weights`, (n, c); no meaning where not `valid`."""
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
        self._evidence = np.zeros((len(_EVIDENCE), 0))
        self.seen = 0

    @property
    def rows(self) -> int:
        """Requests in the window."""
        return min(self.seen, ROWS)

    @property
    def scored(self) -> int:
        """Requests in the window whose choice followed from the weights."""
        return int(np.count_nonzero(self._chosen >= 0))

    def add(self, decision: Decision, outcome: Outcome, floor: float) -> None:
        """Take a finished request. `floor` is the goals' quality floor."""
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
        # After a failover what was measured is another SLM's, so it is nobody's ratio.
        answered = outcome.slm_id == decision.slm_id
        if chosen is not None and answered and decision.path in SCORED_PATHS:
            self._add_candidates(row, decision, kept, floor)
            self._compare(row)

    def retain(self, slm_ids: Iterable[str]) -> None:
        """Forget SLMs that left; rows that chose one of them keep what was measured."""
        keep = [i for i, slm in enumerate(self._slms) if slm in set(slm_ids)]
        place = np.full(len(self._slms) + 1, -1, np.intp)  # the last one answers for -1
        place[keep] = range(len(keep))
        self._chosen = place[self._chosen]
        self._slms = [self._slms[i] for i in keep]
        self._raw, self._valid = self._raw[:, :, keep], self._valid[:, keep]
        self._evidence = self._evidence[:, keep]

    def measured(self) -> tuple[Array, Array, float]:
        """TTFT, E2E and energy (3, rows) of all requests, predicted quality, mean gap in s."""
        order = self._newest_first()
        return self._measured[:, order], self._quality[order], self._gap_s(order)

    def terms(self) -> Terms:
        """The arrays that another choice is computed from."""
        order = self._newest_first()
        age = np.arange(len(order))
        weights = 0.5 ** (age / HALF_LIFE_ROWS)
        weights /= weights.sum()
        is_scored = self._chosen[order] >= 0
        rows = order[is_scored]
        raw, chosen = self._raw[:, rows], self._chosen[rows]
        measured = self._measured[:, rows]
        ratio = self._ratio()
        predicted = raw[TTFT:ENERGY, np.arange(len(chosen)), chosen] * ratio[:2, chosen]
        return Terms(
            raw=raw,
            valid=self._valid[rows],
            chosen=chosen,
            measured=measured,
            weights=weights[is_scored],
            ratio=ratio,
            spread=_spread(np.log(measured[:2] / np.maximum(predicted, TINY)), weights[is_scored]),
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
        # Chosen below a floor that was set since: true, but not what would be done now.
        self._chosen[row] = chosen if self._valid[row, chosen] else -1

    def _compare(self, row: int) -> None:
        """Add the chosen SLM's measurements to the evidence on its predictions."""
        self._evidence *= IDLE_KEEP
        slm = self._chosen[row]
        if slm < 0:
            return
        measured, predicted = self._measured[:, row], self._raw[TTFT : ENERGY + 1, row, slm]
        known = ~np.isnan(measured)
        logs = np.log(measured[:2] / np.maximum(predicted[:2], TINY))
        new = np.array([*known, *logs, measured[2], predicted[2]])
        of = np.array([*known, *known[:2], known[2], known[2]])
        mine = self._evidence[:, slm]
        self._evidence[of, slm] = mine[of] * _KEEP[of] + new[of]

    def _ratio(self) -> Array:
        """Measured over predicted, (3, c).

        An SLM without evidence is taken to be as far off as the mean of those that have some.
        """
        count, prior = self._evidence[:3], RATIO_PRIOR_ROWS
        ratio = np.ones_like(count)
        for kind in range(3):
            seen = count[kind]
            if not seen.any():
                continue
            if kind < 2:
                log_ratio = self._evidence[3 + kind] / (seen + prior)
            else:  # a mean is held, so the ratio of means counts
                spent, predicted = self._evidence[5:]
                usual = prior * max(float(predicted.sum() / seen.sum()), TINY)
                log_ratio = np.log((spent + usual) / (predicted + usual))
            own = seen / (seen + prior)
            others = float(np.average(log_ratio, weights=own))
            ratio[kind] = np.exp(own * log_ratio + (1.0 - own) * others)
        return ratio

    def _column(self, slm_id: str) -> int:
        if slm_id not in self._slms:
            self._slms.append(slm_id)
            self._evidence = np.pad(self._evidence, ((0, 0), (0, 1)))
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
        return float(np.average(gaps, weights=0.5 ** (np.arange(len(gaps)) / HALF_LIFE_ROWS)))


def _spread(left: Array, weights: Array) -> Array:
    """Standard deviation (2,) of what corrections leave of log(measured / predicted), (2, n)."""
    known = ~np.isnan(left)
    mine = np.where(known, weights, 0.0) / weights.max() if len(weights) else np.zeros((2, 0))
    squares = (mine * np.where(known, left, 0.0) ** 2).sum(axis=1)
    prior = RATIO_PRIOR_ROWS
    variance = (squares + prior * PRIOR_SPREAD**2) / (mine.sum(axis=1) + prior)
    spread: Array = np.maximum(np.sqrt(variance), MIN_SPREAD)
    return spread
