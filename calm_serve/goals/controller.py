"""Goals instead of weights: multipliers that move until the operator's targets hold.

What is maximised is quality less the costs under the stated weights. Every goal is a constraint of
that and has a Lagrange multiplier x, the price of missing it (arXiv 2602.03632 leaves the weights
to people). The weights in use are

    quality             1 + x
    energy              stated + x / unit per joule; power is energy per request at this rate
    p95 TTFT, p95 E2E   x / unit per second predicted beyond FREE_RATIO of the target

The unit is the target, or the mean over the candidates where that is larger, so that an x means
the same whatever the target is.

A p95 goal needs the slowest requests to be faster, not all of them. So its price is a hinge, the
convex form of a quantile (Rockafellar and Uryasev, Optimization of CVaR, 2000). TTFT and E2E have
one each, because a lower E2E need not mean a lower TTFT. Simulated (tests/goal_world.py), a price
on every second holds the same p95 at 0.07 less quality.

The choice is a step function of the multipliers, so a gradient would need a step size for each
fleet. `step` scans instead: it recomputes the choices of the last requests under other multipliers,
one at a time and all together, and takes those that miss the goals least and then cost least.
Predictions are corrected per SLM by what was measured. For a p95 goal the expected share of late
requests counts, with the measured spread. Where not all goals can hold, quality comes before
latency before energy, by PENALTIES. Multipliers are bounded. They approach the result of the scan
over several steps, because the load follows the choice; those of quality and energy take it at once
after the goals have changed.

Each router holds the goals for its own requests, so the fleet holds them. Power is divided by the
number of routers. With few scored requests, or without targets, the weights stay as they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from calm_serve.config import Goals
from calm_serve.goals import window as gw
from calm_serve.goals.window import Array, GoalWindow, Terms
from calm_serve.routing import weights_of
from calm_serve.types import Decision, GoalStatus, Outcome, Weights

TOLERANCE = 0.1  # a goal holds when the measured value is within this ratio of it
FREE_RATIO = 0.7  # share of a p95 target that costs nothing
# The scan aims a little beyond the targets, because measured values scatter around its aim.
AIM_LATE_RATIO, AIM_ENERGY_RATIO, AIM_QUALITY_RATIO = 0.035, 0.97, 1.005
BIAS_LIMIT = 0.04  # of the share of late requests that the spread does not explain

# Added to a late request's count of 1 for each factor e that it is late by. So less late is better
# even where on time is out of reach; and a few very late requests make a p95 jump.
LATER = 0.3

MIN_SCORED = 16  # fewer scored requests in the window leave the weights as they are
STEP_ROWS = 8  # finished requests between two steps
ENCODE_ROWS = 64  # requests added to the window per step, which bounds the time of a step
LIMIT = 30.0  # of a multiplier: one unit then counts 30 times all of quality
# A multiplier's value after a step: at most FIRST or FASTER times the last, at least SLOWER times.
FIRST, FASTER, SLOWER = 0.2, 3.0, 0.4
NEGLIGIBLE = 1e-3  # a falling multiplier below this is 0
# The scan, chosen by hand. A multiplier's best value depends on the others, so each is scanned
# twice. It tries these factors of the last value, near ones for small corrections and jumps up to
# FASTER, and fixed places a factor of 3 to 6 apart, so that a multiplier leaves 0. tests/unit/goals
# notices when only the factors 0, 1 and 3 are left, but neither one sweep nor two places.
SWEEPS = 2
_FACTORS = np.array([0.0, 0.1, 0.3, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.7, 3.0])
_PLACES = np.array([0.005, 0.03, 0.15, 0.6, 2.5, 10.0, LIMIT])
# In points of quality: a gain below the first is rounding and moves nothing. The second is the
# price of log(1 + multiplier), too low to outweigh any goal or request: it only decides ties.
ROUNDING, TIE_COST = 1e-9, 1e-6
# The logistic function of this slope is the one nearest to the normal distribution.
LOGISTIC_SLOPE = 1.702
MAX_EXPONENT = 50.0  # of exp, which would overflow; e**-50 is nothing beside a share
# Penalty, in points of quality, of missing a goal entirely: quality, TTFT, E2E, energy.
PENALTIES = np.array([1e5, 1e3, 1e3, 30.0])
# A goal counts as feasible up to this miss of the aim, because the aim is stricter than the goal.
FEASIBLE_MISS = np.array([0.02, 0.025, 0.025, 0.08])
_QUALITY, _TTFT, _E2E, _ENERGY = range(4)
_OF_TARGET = {
    "min_quality": _QUALITY,
    "ttft_p95_s": _TTFT,
    "e2e_p95_s": _E2E,
    "energy_per_request_j": _ENERGY,
    "power_w": _ENERGY,
}


class GoalController:
    """Moves one router's weights. Single-threaded; `learn` is O(1), `step` takes about 1 ms.

    Args:
        routers: how many processes share the power budget.
    """

    def __init__(self, goals: Goals, *, routers: int = 1) -> None:
        self._routers = routers
        self._window = GoalWindow()
        self._pending: deque[tuple[Decision, Outcome]] = deque(maxlen=gw.ROWS)
        self._x = np.zeros(4)  # multipliers in use
        self._found = np.zeros(4)  # result of the last scan
        self.set_goals(goals)

    def set_goals(self, goals: Goals) -> None:
        """Swap the goals. The stated weights hold until the next step; the window is kept."""
        self._goals = goals
        self._stated = weights_of(goals)
        self._active = sorted({_OF_TARGET[name] for name in goals.targets})
        self._x, self._found = np.zeros(4), np.zeros(4)
        self._feasible: dict[int, bool] = {}
        self._fresh = True
        self._stepped_at = self._window.seen - STEP_ROWS
        self.weights: Weights = self._stated

    def retain(self, slm_ids: Iterable[str]) -> None:
        """Forget the SLMs that left the fleet."""
        self._encode(gw.ROWS)
        self._window.retain(slm_ids)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Queue a finished request for the next step."""
        self._pending.append((decision, outcome))

    def step(self) -> Weights:
        """Move the weights by what was learned since the last step, and return them."""
        if not self._active:
            return self.weights
        self._encode(ENCODE_ROWS)
        window = self._window
        if window.seen - self._stepped_at < STEP_ROWS or window.scored < MIN_SCORED:
            return self.weights
        self._stepped_at = window.seen
        search = _Search(window.terms(), self._goals, self._stated, self._routers)
        self._found, missed = search.run(self._found, self._active)
        self._feasible = {g: bool(missed[g] <= FEASIBLE_MISS[g]) for g in self._active}
        highest = np.maximum(self._x * FASTER, FIRST)
        if self._fresh:  # these two follow from the choice alone, not from the load
            highest[[_QUALITY, _ENERGY]] = LIMIT
            self._fresh = False
        self._x = np.clip(self._found, self._x * SLOWER, highest)
        self._x[(self._found == 0.0) & (self._x < NEGLIGIBLE)] = 0.0
        self.weights = search.weights(self._x)
        return self.weights

    def status(self) -> list[GoalStatus]:
        """Every target that is set, with the measured value over the window."""
        targets = self._goals.targets
        if not targets:
            return []
        self._encode(gw.ROWS)
        (ttft, e2e, energy), quality, gap_s = self._window.measured()
        found = {
            "ttft_p95_s": _p95(ttft),
            "e2e_p95_s": _p95(e2e),
            "energy_per_request_j": _mean(energy),
            "min_quality": _mean(quality),
        }
        joules, samples = found["energy_per_request_j"]
        known = joules is not None and gap_s > 0
        power = joules / gap_s * self._routers if joules is not None and known else None
        found["power_w"] = (power, samples)
        return [self._status(name, target, *found[name]) for name, target in targets.items()]

    def _status(self, name: str, target: float, measured: float | None, samples: int) -> GoalStatus:
        held = None
        if measured is not None:
            held = (
                measured >= target * (1.0 - TOLERANCE)
                if name == "min_quality"
                else measured <= target * (1.0 + TOLERANCE)
            )
        feasible = self._feasible.get(_OF_TARGET[name])
        return GoalStatus(name, target, measured, held, feasible, samples)

    def _encode(self, rows: int) -> None:
        for _ in range(min(rows, len(self._pending))):
            decision, outcome = self._pending.popleft()
            self._window.add(decision, outcome, self._goals.quality_floor)


class _Search:
    """Recomputes the choices for the window's requests under other multipliers."""

    def __init__(self, terms: Terms, goals: Goals, stated: Weights, routers: int) -> None:
        n, slms = terms.valid.shape
        self._terms, self._goals, self._stated = terms, goals, stated
        self._offset = np.arange(n) * slms
        self._weights = terms.weights
        self._share = float(terms.weights.sum())
        self._energy_j = _energy_target(goals, terms.gap_s, routers)
        raw, spread = terms.raw, terms.spread
        typical = raw.sum(axis=(1, 2)) / terms.valid.sum()
        self._knee_s = [0.0, 0.0]  # from these times on, TTFT and E2E cost
        self._unit = np.maximum(typical[gw.TTFT : gw.ENERGY + 1], gw.TINY)
        late = np.zeros((2, n, slms))
        if np.isfinite(self._energy_j):
            self._unit[2] = max(self._unit[2], self._energy_j)
        self._bias, self._rest_late = np.zeros(2), np.zeros(2)
        for kind, (term, target_s) in enumerate(
            ((gw.TTFT, goals.ttft_p95_s), (gw.E2E, goals.e2e_p95_s))
        ):
            if target_s is None:
                continue
            # The target on the scale of the predictions, which decide. The scale is that of the
            # SLM that is slowest against its predictions, or the free part would hide its delay.
            scaled_s = target_s / float(terms.ratio[kind].max())
            self._knee_s[kind] = FREE_RATIO * scaled_s
            self._unit[kind] = max(self._unit[kind], scaled_s)
            over = np.log(np.maximum(raw[term] * terms.ratio[kind] / target_s, gw.TINY))
            late[kind] = _above_1(over / spread[kind])
            self._bias[kind] = self._unexplained(late[kind], kind, target_s)
            late[kind] += LATER * np.maximum(over, 0.0)
            self._rest_late[kind] = terms.rest_weights @ (terms.rest[kind] > target_s)
        energy = raw[gw.ENERGY] * terms.ratio[2]
        self._rest_j = float(np.nan_to_num(terms.rest[2]) @ terms.rest_weights)
        base = terms.reward(stated)
        # The reward is linear in the multipliers; a feature is the slope of one of them.
        features = [terms.reward(self.weights(x)) - base for x in np.eye(4)]
        self._features = np.stack(features).reshape(4, -1)
        self._base = np.where(terms.valid, base, -np.inf).reshape(-1)
        stacked = (np.where(terms.valid, base, 0.0), raw[gw.QUALITY], *late, energy)
        self._metrics = np.stack(stacked).reshape(5, -1)

    def run(self, start: Array, active: list[int]) -> tuple[Array, Array]:
        """Return the best multipliers found from `start`, and by how much each goal is missed."""
        best, score, missed = start, *(a[0] for a in self._scored(start[None]))
        for _ in range(SWEEPS):
            before = best
            for points in self._scans(best, active):
                scores, misses = self._scored(points)
                top = int(scores.argmax())
                if scores[top] > score + ROUNDING:
                    best, score, missed = points[top], scores[top], misses[top]
            if best is before:
                break
        return best, missed

    def weights(self, x: Array) -> Weights:
        """Return the weights for the multipliers `x`, (4,)."""
        prices = x[1:] / self._unit
        return replace(
            self._stated,
            quality=1.0 + float(x[_QUALITY]),
            energy_per_j=self._stated.energy_per_j + float(prices[2]),
            late_ttft_per_s=float(prices[0]),
            late_ttft_after_s=self._knee_s[0],
            late_e2e_per_s=float(prices[1]),
            late_e2e_after_s=self._knee_s[1],
        )

    def _scans(self, x: Array, active: list[int]) -> Iterable[Array]:
        for goal in active:
            values = np.concatenate([x[goal] * _FACTORS, _PLACES])
            points = np.repeat(x[None], len(values), axis=0)
            points[:, goal] = np.minimum(values, LIMIT)
            yield points
        if len(active) > 1:
            yield np.minimum(x * _FACTORS[:, None], LIMIT)

    def _scored(self, points: Array) -> tuple[Array, Array]:
        """Return the scores (g,) and the misses (g, 4) of g points (g, 4)."""
        n = len(self._offset)
        scores = (points @ self._features + self._base).reshape(len(points), n, -1)
        picked = scores.argmax(axis=2) + self._offset
        reward, quality, ttft, e2e, energy = self._metrics.take(picked, axis=1) @ self._weights
        missed = np.zeros((len(points), 4))
        goals = self._goals
        if goals.min_quality is not None:
            floor = min(goals.min_quality * AIM_QUALITY_RATIO, 1.0)
            missed[:, _QUALITY] = floor - quality / self._share
        for goal, kind, late in ((_TTFT, 0, ttft), (_E2E, 1, e2e)):
            share = late + self._bias[kind] * self._share + self._rest_late[kind]
            missed[:, goal] = share - AIM_LATE_RATIO
        if np.isfinite(self._energy_j):
            missed[:, _ENERGY] = (energy + self._rest_j) / self._energy_j - AIM_ENERGY_RATIO
        missed = np.maximum(missed, 0.0)
        # Ties go to the smallest multipliers, so that they fall again when there is headroom.
        return reward - missed @ PENALTIES - TIE_COST * np.log1p(points).sum(axis=1), missed

    def _unexplained(self, late: Array, kind: int, target_s: float) -> float:
        """Return the measured less the expected share of late requests, bounded."""
        terms = self._terms
        known = ~np.isnan(terms.measured[kind])
        if not known.any():
            return 0.0
        expected = late[np.arange(len(known)), terms.chosen][known]
        seen = terms.measured[kind][known] > target_s
        gap = np.average(seen - expected, weights=terms.weights[known])
        return float(np.clip(gap, -BIAS_LIMIT, BIAS_LIMIT))


def _energy_target(goals: Goals, gap_s: float, routers: int) -> float:
    """Return the joules that a request may take on average; infinite without such a goal."""
    joules = goals.energy_per_request_j or float("inf")
    if goals.power_w is not None and gap_s > 0:
        joules = min(joules, goals.power_w * gap_s / routers)
    return joules


def _above_1(z: Array) -> Array:
    """Return P(x > 1) of a log-normal x; the mean of log(x) is `z` standard deviations.

    The logistic function stands for the normal distribution, because numpy has no error function.
    `routing.scoring` has the exact one for a single number; here it would take 13 to 30 times as
    long (a window of 192 requests and 3 to 12 SLMs: 0.13 to 0.56 ms instead of 0.01 to 0.02), and
    a step scans with it twice. The error is below 0.01, a fraction of AIM_LATE_RATIO.
    """
    return 1.0 / (1.0 + np.exp(np.clip(-LOGISTIC_SLOPE * z, -MAX_EXPONENT, MAX_EXPONENT)))


def _p95(values: Array) -> tuple[float | None, int]:
    known = values[~np.isnan(values)]
    return (float(np.percentile(known, 95)) if len(known) else None), len(known)


def _mean(values: Array) -> tuple[float | None, int]:
    known = values[~np.isnan(values)]
    return (float(known.mean()) if len(known) else None), len(known)
