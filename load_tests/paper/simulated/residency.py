"""Residency policies on traces of preferred SLMs, compared with the offline optimum.

A trace is what the real router prefers with every SLM hot. It is replayed with each policy's
planner and with Belady's optimum. Waking takes no time here, so only the choice of the SLMs in
memory is compared; `scenarios` has the hit rate of requests when the router knows which SLMs are
hot.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from calm_serve.config import Goals, ResidencyPolicyName
from calm_serve.residency import ModelFootprint, build
from calm_serve.routing import ModelSelector
from calm_serve.testing import decision_for
from calm_serve.types import Residency
from load_tests.common import arrivals
from load_tests.paper.simulated.answers import Answers, shipped
from load_tests.paper.simulated.belady import belady, belady_bound
from load_tests.paper.simulated.memory import NODE, half_of_fleet
from load_tests.paper.simulated.replay import ids_of, replay
from load_tests.paper.simulated.scenarios import Figures, options_of, with_requests

ARRIVALS = 3000
RATE_RPS = 0.5  # low enough for the guards against thrashing; the paper has 25 a minute
PHASE = 60  # requests of mostly two tasks
PHASE_RATIO = 0.9
POLICIES = tuple(ResidencyPolicyName)


def traces(answers: Answers, seed: int) -> Figures:
    """Hit rates on shuffled requests, and on requests whose tasks come in phases."""
    rng = Random(seed)
    at_s = arrivals.day(ARRIVALS, RATE_RPS, rng)
    found: Figures = {}
    for name, requests in (
        ("mixed", [r for _, r in with_requests(answers, at_s, seed)]),
        ("phases", _phases(answers, rng)),
    ):
        preferred = _preferred(answers, requests)
        trace = list(zip(at_s, preferred, strict=True))
        found |= {f"trace.{name}.{k}": v for k, v in _equal(answers, trace).items()}
        found |= {f"trace.{name}.{k}": v for k, v in _by_bytes(answers, trace).items()}
    return found


def _equal(answers: Answers, trace: Sequence[tuple[float, str]]) -> Figures:
    """Equal places for half of the SLMs."""
    ids = [s.id for s in answers.fleet.slms]
    places = len(ids) // 2
    best = belady(ids_of(trace), places, ids[:places]) / len(trace)
    found: Figures = {"belady": best}
    for policy in POLICIES:
        footprints = [_footprint(answers, i, 1, n < places) for n, i in enumerate(ids)]
        planner = build(options_of(policy, places), latency_per_s=0.1, energy_per_j=0.002)
        hits = replay(trace, planner, footprints, places)
        found[f"{policy}.hit_rate"] = hits.hit_ratio
        found[f"{policy}.hit_ratio_belady"] = hits.hit_ratio / best
        found[f"{policy}.swaps_per_request"] = hits.swaps / len(trace)
        found[f"{policy}.refused"] = float(hits.expired)
    return found


def _by_bytes(answers: Answers, trace: Sequence[tuple[float, str]]) -> Figures:
    """Sizes in declared bytes; Belady's hit rate is then an upper bound."""
    budget, left, first = half_of_fleet(answers), half_of_fleet(answers), list[str]()
    sizes = {s.id: s.declared_bytes for s in answers.fleet.slms}
    for slm_id, size in sizes.items():
        if size <= left:
            first.append(slm_id)
            left -= size
    footprints = [_footprint(answers, i, size, i in first) for i, size in sizes.items()]
    planner = build(
        options_of(ResidencyPolicyName.CALM, budget), latency_per_s=0.1, energy_per_j=0.002
    )
    hits = replay(trace, planner, footprints, budget)
    bound = belady_bound(ids_of(trace), sizes, budget, first) / len(trace)
    return {"bytes.calm.hit_rate": hits.hit_ratio, "bytes.belady_bound": bound}


def _footprint(answers: Answers, slm_id: str, size: int, hot: bool) -> ModelFootprint:
    speed = answers.speeds[slm_id]
    residency = Residency.HOT if hot else Residency.ASLEEP
    return ModelFootprint(slm_id, {NODE: size}, residency, wake_s=speed.wake_s, wake_j=speed.wake_j)


def _preferred(answers: Answers, requests: Sequence[int]) -> list[str]:
    selector = ModelSelector(
        answers.fleet, Goals(), predictor=shipped(answers.fleet), decision_log=1
    )
    chosen = {i: decision_for(selector, answers.contexts[i]).slm_id for i in sorted(set(requests))}
    return [chosen[i] for i in requests]


def _phases(answers: Answers, rng: Random) -> list[int]:
    """Requests in phases of PHASE, most of a phase from two tasks, as from groups of users."""
    tasks = answers.tasks()
    by_task = {t: [i for i, task in enumerate(tasks) if task == t] for t in sorted(set(tasks))}
    found: list[int] = []
    while len(found) < ARRIVALS:
        pool = [i for task in rng.sample(sorted(by_task), 2) for i in by_task[task]]
        for _ in range(PHASE):
            usual = rng.random() < PHASE_RATIO
            found.append(rng.choice(pool) if usual else rng.randrange(len(answers)))
    return found[:ARRIVALS]
