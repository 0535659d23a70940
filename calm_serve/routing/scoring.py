"""Stage 2: score quality against latency, energy and switching, and choose.

`reward` is the one formula; the choice, the goals and off-policy evaluation call it. Quality is
P(success) times the SLM's calibration factor (recent successes over predicted ones); latency is
seconds, with a penalty for an SLO that will probably be missed; energy is joules; switching is 1
when the SLM is not hot. The CALM paper (arXiv 2602.03632) weighs semantic fit and recent QoS by
hand-tuned weights in the same form; here every term is a prediction for this request in the fleet's
present state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt

from calm_serve.config import Goals, SLMSpec
from calm_serve.prediction import wake_s
from calm_serve.types import (
    UNKNOWN_LANGUAGE,
    Candidate,
    GeneralTerms,
    Prediction,
    Residency,
    RoutingContext,
    ServiceLevel,
    SLMState,
    Weights,
)

# One number of a candidate, or the same of many candidates as an array.
Number = TypeVar("Number", float, npt.NDArray[np.float64])

# Quality points that a certain miss of the request's SLO costs.
SLO_PENALTY = 0.5
# What exploration may cost: latency in quality points, and points of probability by which it may
# make the miss of an SLO more likely.
EXPLORED_LATENCY = 0.25
EXPLORED_MISS_RATIO = 0.05
# The least spread to divide by; a prediction that was logged or made by hand may have one of 0. It
# is below MIN_SPREAD of `telemetry.residuals`, so it decides nothing in a running router.
DIVISOR_SPREAD = 0.01
_SQRT2 = math.sqrt(2.0)
NO_SLO = ServiceLevel()


def weights_of(goals: Goals) -> Weights:
    """Return the weights that the operator configured; a controller starts from them."""
    return Weights(goals.latency_weight_per_s, goals.energy_weight_per_j, goals.switching_weight)


def reward(
    weights: Weights,
    quality: Number,
    ttft_s: Number,
    e2e_s: Number,
    energy_j: Number,
    penalty: Number | float = 0.0,
) -> tuple[Number, Number, Number]:
    """The reward of an answer, its latency cost and its energy cost, in quality points.

        latency = w_latency * e2e_s + penalty + late_ttft + late_e2e
        energy = w_energy * energy_j
        reward = w_quality * quality - latency - energy

    with late_ttft and late_e2e the cost of seconds beyond what a p95 goal leaves free
    (`types.Weights`), w_late * max(seconds - after_s, 0).

    All values are floats, or all are arrays of one shape; NaN stays NaN. `penalty` is that of an
    SLO (`slo_penalty`). The cost of switching is subtracted by the caller that decides.
    """
    latency = weights.latency_per_s * e2e_s + penalty
    if weights.late_ttft_per_s:
        over_s = ttft_s - weights.late_ttft_after_s
        latency = latency + weights.late_ttft_per_s * ((over_s > 0.0) * over_s)
    if weights.late_e2e_per_s:
        over_s = e2e_s - weights.late_e2e_after_s
        latency = latency + weights.late_e2e_per_s * ((over_s > 0.0) * over_s)
    energy = weights.energy_per_j * energy_j
    return weights.quality * quality - latency - energy, latency, energy


def evaluate(
    slo: ServiceLevel,
    prediction: Prediction,
    state: SLMState,
    weights: Weights,
    quality_factor: float = 1.0,
    general: GeneralTerms | None = None,
) -> Candidate:
    """Score one candidate; the terms of the sum are kept for the explanation.

    `quality_factor` is what the request itself takes from P(success) (`language_factor`). `general`
    is part of no score: it is kept for unfamiliar prompts (`unfamiliar`).
    """
    quality = min(prediction.success_ratio * state.calibration_factor, 1.0) * quality_factor
    value, latency, energy = reward(
        weights,
        quality,
        prediction.ttft_s,
        prediction.e2e_s,
        prediction.energy_j,
        slo_penalty(slo, prediction),
    )
    switching = 0.0 if state.residency is Residency.HOT else weights.switching
    return Candidate(
        slm_id=prediction.slm_id,
        prediction=prediction,
        quality=quality,
        latency=latency,
        energy=energy,
        switching=switching,
        score=value - switching,
        general=general,
    )


def language_factor(context: RoutingContext, spec: SLMSpec) -> float:
    """Return the probability that the SLM understands the prompt's language, as far as is known."""
    if not spec.languages or context.language in (UNKNOWN_LANGUAGE, *spec.languages):
        return 1.0
    return 1.0 - context.language_ratio


def slo_penalty(slo: ServiceLevel, prediction: Prediction) -> float:
    """Return SLO_PENALTY times the probability that the request's SLO is missed.

    Measured times are assumed log-normal around the predicted ones. Of several SLOs only the one
    most likely to be missed counts, because one slow phase usually misses all of them together.
    """
    if not (slo.ttft_ms or slo.tpot_ms or slo.deadline_s):
        return 0.0
    missed = 0.0
    if slo.ttft_ms:
        over = prediction.ttft_s * 1000.0 / slo.ttft_ms
        missed = _above_one(over, prediction.ttft_spread)
    if slo.tpot_ms:
        over = prediction.tpot_s * 1000.0 / slo.tpot_ms
        missed = max(missed, _above_one(over, prediction.e2e_spread))
    if slo.deadline_s:
        over = prediction.e2e_s / slo.deadline_s
        missed = max(missed, _above_one(over, prediction.e2e_spread))
    return SLO_PENALTY * missed


def _above_one(middle: float, spread: float) -> float:
    """P(X > 1) where log(X) is normal around log(middle).

    `goals.controller` approximates the same for arrays, where numpy has no error function. Here the
    exact one is as fast, and a decision is not to move with the approximation.
    """
    if middle <= 0.0:
        return 0.0
    return 0.5 * math.erfc(-math.log(middle) / (max(spread, DIVISOR_SPREAD) * _SQRT2))


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """Return candidates by score, best first; ties by id, so that every process agrees."""
    return sorted(candidates, key=lambda c: (-c.score, c.slm_id))


def above_floor(candidates: list[Candidate], floor: float) -> list[Candidate]:
    """Return candidates at or above the floor; the one of best quality if none reaches it."""
    kept = [c for c in candidates if c.quality >= floor]
    return kept or [max(candidates, key=lambda c: (c.quality, c.slm_id))]


def preferred(
    slo: ServiceLevel,
    scored: Sequence[Candidate],
    specs: Mapping[str, SLMSpec],
    states: Mapping[str, SLMState],
    weights: Weights,
    floor: float,
) -> str:
    """Return the SLM that would win if all were hot; "" when all are."""
    if all(states[c.slm_id].residency is Residency.HOT for c in scored):
        return ""
    awake: list[Candidate] = []
    for candidate in scored:
        state, prediction = states[candidate.slm_id], candidate.prediction
        if state.residency is Residency.HOT or prediction is None:
            awake.append(candidate)
            continue
        awake_s = prediction.ttft_s - wake_s(specs[candidate.slm_id], state)
        hot = replace(prediction, ttft_s=max(awake_s, 0.0))
        # The quality is that of the candidate: only its wake-up and its switching go.
        as_hot = evaluate(slo, hot, replace(state, residency=Residency.HOT), weights)
        gain = weights.quality * (candidate.quality - as_hot.quality)
        awake.append(replace(as_hot, quality=candidate.quality, score=as_hot.score + gain))
    return above_floor(ranked(awake), floor)[0].slm_id


def draw(decision_id: str) -> float:
    """A number in [0, 1) that follows from the decision's id alone."""
    return crc32(decision_id.encode()) / 2**32


def explore(
    order: list[Candidate], decision_id: str, ratio: float, slo: ServiceLevel = NO_SLO
) -> tuple[Candidate, float, bool]:
    """Choose the best candidate, or with probability `ratio` another one at random.

    Exploration stays inside the SLO's headroom: eligible are candidates that miss the request's SLO
    with a probability at most EXPLORED_MISS_RATIO above the best one's, whose latency term exceeds
    the best one's by at most EXPLORED_LATENCY, and that need no wake-up where the best one needs
    none. Returns (candidate, its propensity, whether this was exploration). The draw is a hash of
    the decision's id, so a replay of the record makes the same choice.

    >>> explore([Candidate("a", score=1.0), Candidate("b", score=0.9)], "some-id", 0.0)[1:]
    (1.0, False)
    """
    best = order[0]
    if ratio <= 0.0:
        return best, 1.0, False
    most_penalty = _penalty(slo, best) + SLO_PENALTY * EXPLORED_MISS_RATIO
    others = [
        c
        for c in order[1:]
        # Exploration wakes no SLM, and so puts no other one to sleep.
        if c.latency <= best.latency + EXPLORED_LATENCY
        and c.switching <= best.switching
        and _penalty(slo, c) <= most_penalty
    ]
    if not others:
        return best, 1.0, False
    drawn = draw(decision_id)
    if drawn >= ratio:
        return best, 1.0 - ratio, False
    position = min(int(drawn / ratio * len(others)), len(others) - 1)  # the product may round up
    return others[position], ratio / len(others), True


def _penalty(slo: ServiceLevel, candidate: Candidate) -> float:
    return 0.0 if candidate.prediction is None else slo_penalty(slo, candidate.prediction)
