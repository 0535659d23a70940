"""The long run of the `paper` experiment: growth and drift over 1,000 SLM-hours."""

from __future__ import annotations

import gc
import math
from random import Random
from typing import Any

import numpy as np

from calm_serve.config import Goals, ResidencyPolicyName
from load_tests.common import arrivals
from load_tests.paper.simulated.answers import Answers, shipped
from load_tests.paper.simulated.memory import half_of_fleet
from load_tests.paper.simulated.scenarios import Figures, options_of, with_requests
from load_tests.paper.simulated.world import World
from load_tests.scale import state

PARTS = 4  # of the run, which are compared
PIECES = 64  # of a part; the weights are read after each
ENERGY_GOAL = 0.8  # over a request's energy when the largest SLM answers it alone


def slm_hours(answers: Answers, seed: int, *, hours: float, requests: int) -> Figures:
    """Days of traffic with memory for half the fleet and an energy goal: growth and drift.

    `hours` is the sum over all SLMs. Days follow `world_cup` without compression, so nights are
    long and almost idle, the hard case for statistics that decay with time.
    """
    days = hours / 24.0 / len(answers.fleet.slms)
    each = round(requests / days)
    rng, at_s = Random(seed), list[float]()
    for day in range(math.ceil(days)):
        # The last day is cut off, not compressed, so that all days have the same load.
        share = min(days - day, 1.0)
        times = arrivals.day(each, each / 86_400.0, rng)
        at_s += [day * 86_400.0 + t for t in times if t < share * 86_400.0]
    arrived = with_requests(answers, at_s, seed)
    goals = Goals(energy_per_request_j=ENERGY_GOAL * answers.alone()[1])
    world = World(
        answers,
        goals,
        seed=seed,
        predictor=shipped(answers.fleet),
        residency=options_of(ResidencyPolicyName.CALM, half_of_fleet(answers)),
        feedback_ratio=0.3,
    )
    sizes, weights = list[float](), list[list[float]]()
    for part in np.array_split(np.arange(len(arrived)), PARTS):
        weights.append([])
        for piece in np.array_split(part, PIECES):
            world.serve([arrived[i] for i in piece])
            weights[-1].append(world.selector.weights.energy_per_j)
        gc.collect()
        sizes.append(_state_bytes(world))
    world.finish()
    quarters = np.array_split(np.array([r.exact for r in world.rows]), PARTS)
    latency = np.array_split(np.array([r.latency_s for r in world.rows]), PARTS)
    joules = np.array_split(np.array([r.energy_j for r in world.rows]), PARTS)
    return {
        "hours.slm_hours": world.clock.now_s / 3600.0 * len(answers.fleet.slms),
        "hours.requests": float(len(world.rows)),
        "hours.state_bytes": sizes[-1],
        "hours.state_growth_ratio": sizes[-1] / sizes[1],
        "hours.exact_change": float(quarters[-1].mean() - quarters[1].mean()),
        "hours.latency_ratio": float(np.nanmean(latency[-1]) / np.nanmean(latency[1])),
        "hours.energy_ratio": float(np.nanmean(joules[-1]) / np.nanmean(joules[1])),
        "hours.weight_ratio": float(np.mean(weights[-1]) / np.mean(weights[1])),
        "hours.unanswered": float(sum(bool(r.error) for r in world.rows)),
    }


def _state_bytes(world: World) -> float:
    """Bytes kept by the router's core, the outcome monitor and the planner."""
    assert world.memory is not None
    parts: dict[str, Any] = {
        "selector": world.selector,
        "stats": world.stats,
        "outcome_monitor": world.outcome_monitor,
        "planner": world.memory.planner,
    }
    shared = [world.answers, world.selector.predictor, world.selector.fleet]
    return float(sum(size for size, _ in state.sizes(parts, shared).values()))
