"""Simulated traffic of the `paper` experiment: every policy, and a flash crowd.

Each function runs one seed and returns figures by name; `benchmark` runs the seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

import numpy as np

from calm_serve.config import (
    Goals,
    ResidencyOptions,
    ResidencyPolicyName,
    SelectionPolicy,
    SelectionPolicyName,
    SLMSpec,
)
from calm_serve.prediction import Predictor
from calm_serve.types import Novelty, Prediction, PredictorVersion, RoutingContext, SLMState
from load_tests.common import arrivals
from load_tests.paper.simulated.answers import Answers, shipped
from load_tests.paper.simulated.belady import belady
from load_tests.paper.simulated.call import Row
from load_tests.paper.simulated.memory import half_of_fleet
from load_tests.paper.simulated.world import World

OURS, PAPER, LARGEST, SHARES, ORACLE = "calm", "paper", "largest", "shares", "oracle"
THRIFTY = "calm_thrifty"  # ours with other weights, see `thrifty`
PLAIN = ("random", "round_robin", "least_loaded", "rules", "fastest")
BUSY_RATIO = (
    0.4  # mean load, of what the largest SLM alone could serve; the day's peak is 2.5 times
)
GOODPUT_S = 2.0  # an answer within this counts as good
CROWD, CROWD_S = 10.0, 30.0

Figures = dict[str, float]
Arrivals = Sequence[tuple[float, int]]


class Oracle:
    """A predictor that knows every answer: the bound of prediction under our scoring."""

    version = PredictorVersion("oracle")

    def __init__(self, answers: Answers, inner: Predictor) -> None:
        self._answers, self._inner = answers, inner
        self._rows = {id(c.features.numbers): i for i, c in enumerate(answers.contexts)}

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        """As the shipped predictor has it."""
        return self._inner.novelty(bits)

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """True success and length; times and energy as the shipped predictor predicts them."""
        request, found = self._rows[id(context.features.numbers)], []
        for spec, prediction in zip(
            specs, self._inner.predict(context, specs, states), strict=True
        ):
            column = self._answers.column(spec.id)
            tokens = float(self._answers.tables["output_tokens"][request, column])
            found.append(
                Prediction(
                    spec.id,
                    float(self._answers.tables["credit"][request, column]),
                    tokens,
                    prediction.ttft_s,
                    prediction.tpot_s,
                    prediction.energy_j * tokens / max(prediction.output_tokens, 1.0),
                )
            )
        return found


def capacity_rps(answers: Answers, slm_id: str) -> float:
    """Requests per second that one SLM answers with every slot busy."""
    spec = next(s for s in answers.fleet.slms if s.id == slm_id)
    speed, slots = answers.speeds[slm_id], spec.limits.max_num_seqs
    tokens = float(answers.tables["output_tokens"][:, answers.column(slm_id)].mean())
    return slots / (speed.pace(slots) * (speed.first_s + tokens * speed.tpot_s))


def thrifty(answers: Answers) -> Goals:
    """Goals under which one answer of the largest SLM costs half of the range of quality.

    The paper's policy is cheap and often wrong; this compares ours at similar cost. The weights
    were picked from a dozen on one seed of `half_memory`, so as to cost less than the paper's
    there.
    """
    seconds, joules = answers.alone()
    return Goals(
        latency_weight_per_s=0.5 / seconds,
        energy_weight_per_j=0.5 / joules,
        switching_weight=0.1,
    )


def with_requests(answers: Answers, at_s: Sequence[float], seed: int) -> list[tuple[float, int]]:
    """Arrivals with requests of the workload: shuffled, each once before any again."""
    rng, found = Random(seed), list[int]()
    while len(found) < len(at_s):
        found += rng.sample(range(len(answers)), len(answers))
    return list(zip(at_s, found, strict=False))


def arrivals_of(
    kind: str, count: int, rate: float, seed: int, trace: Sequence[float]
) -> list[float]:
    """Seconds of `count` arrivals: a compressed day (`fifa`), or a part of the trace (`azure`)."""
    rng = Random(seed)
    if kind == "fifa":
        return arrivals.day(count, rate, rng)
    return arrivals.scaled(trace, rng.randrange(len(trace) - count), count, rate)


def options_of(policy: str, budget: int) -> ResidencyOptions:
    """Residency under a memory budget in bytes, with the service's defaults."""
    return ResidencyOptions.model_validate({"memory_budget_bytes": budget, "policy": policy})


def policies_on(
    answers: Answers,
    *,
    kind: str,
    count: int,
    seed: int,
    trace: Sequence[float],
    memory: bool,
    policies: Sequence[str],
    load: float,
) -> Figures:
    """All policies on `count` arrivals at the rate `load` times the largest SLM's capacity.

    With memory for half the fleet, requests arrive no faster than SLMs can wake, as in the CALM
    paper; at higher rates wake-ups dominate and the policies no longer differ.
    """
    rate = load * capacity_rps(answers, answers.largest)
    if memory:
        rate = min(rate, 1.0 / max(s.wake_s for s in answers.speeds.values()))
    arrived = with_requests(answers, arrivals_of(kind, count, rate, seed, trace), seed)
    found = every_policy(answers, arrived, seed, memory=memory, policies=policies)
    return {"rate_rps": rate} | found


def every_policy(
    answers: Answers, arrived: Arrivals, seed: int, *, memory: bool, policies: Sequence[str]
) -> Figures:
    """All policies on the same arrivals. With limited memory, ours uses our planner, others LRU."""
    found: Figures = {}
    predictor = shipped(answers.fleet)
    shares: Mapping[str, float] = {}
    for name in policies:
        if name == THRIFTY:
            goals = thrifty(answers)
        else:
            goals = Goals(policy=policy_of(name, answers, shares))
        residency = None
        if memory:
            residency_policy = (
                ResidencyPolicyName.CALM
                if name in (OURS, THRIFTY, ORACLE)
                else ResidencyPolicyName.LRU
            )
            residency = options_of(residency_policy, half_of_fleet(answers))
        fleet = answers.fleet
        chooses: Predictor = predictor
        if name == ORACLE:
            # Rules would decide without the oracle's predictions.
            fleet = answers.fleet.model_copy(update={"rules": ()})
            chooses = Oracle(answers, predictor)
        world = World(
            answers, goals, seed=seed, predictor=chooses, fleet=fleet, residency=residency
        )
        world.serve(arrived)
        world.finish()
        if name == OURS:
            counts = Counter(r.slm for r in world.rows if r.slm)
            shares = {i: n / counts.total() for i, n in counts.items()}
        found |= {f"{name}.{key}": v for key, v in summary(world).items()}
        if memory and name == OURS:
            found |= against_belady(world)
    return found


def policy_of(name: str, answers: Answers, shares: Mapping[str, float]) -> SelectionPolicy:
    """The section `goals.policy` of a policy's name."""
    if name == SHARES:
        return SelectionPolicy(name=SelectionPolicyName.SHARES, shares=dict(shares))
    if name == "single":
        best = int(answers.tables["credit"].mean(axis=0).argmax())
        return SelectionPolicy(name=SelectionPolicyName.SINGLE, slm=answers.slms[best])
    return SelectionPolicy(
        name=SelectionPolicyName.CALM if name == ORACLE else SelectionPolicyName(name)
    )


def summary(world: World) -> Figures:
    """Means over requests; one without an answer has the grade 0 and no latency."""
    rows = world.rows
    latency = np.array([r.latency_s for r in rows])
    joules = float(np.nansum([r.energy_j for r in rows]))
    if world.memory is not None:
        joules += world.memory.wake_j
    answered = ~np.isnan(latency)
    return {
        "latency_s": float(latency[answered].mean()),
        "latency_p95_s": float(np.percentile(latency[answered], 95)),
        "energy_j": joules / max(int(answered.sum()), 1),
        "exact": float(np.mean([r.exact for r in rows])),
        "credit": float(np.mean([r.credit for r in rows])),
        "hit_rate": float(np.mean([r.hit for r in rows])),
        "swaps": float(world.memory.planner.swaps) if world.memory is not None else 0.0,
        "unanswered": float((~answered).sum()),
    }


def against_belady(world: World) -> Figures:
    """Hit rates over Belady's on the SLMs that the router prefers independently of residency."""
    answers = world.answers
    trace = [r.preferred for r in world.rows if r.preferred]
    places = len(answers.fleet.slms) // 2
    best = belady(trace, places, [s.id for s in answers.fleet.slms][:places]) / len(trace)
    served = float(np.mean([r.hit for r in world.rows]))
    # As the served half counts: a request sent to another SLM is not a hit, and Belady may bypass.
    # On shuffled requests no online policy exceeds keeping the most requested SLMs all the time.
    preferred = float(np.mean([r.preferred_hot for r in world.rows if r.preferred]))
    bound = belady(trace, places, list(dict.fromkeys(trace))[:places], bypass=True) / len(trace)
    popular = sum(n for _, n in Counter(trace).most_common(places)) / len(trace)
    return {
        "belady_hit_rate": best,
        "served_hit_ratio_belady": served / best,
        "preferred_hit_rate": preferred,
        "preferred_hit_ratio_belady": preferred / bound,
        "popular_hit_ratio_belady": popular / bound,
    }


def flash_crowd(answers: Answers, seed: int, *, policies: Sequence[str]) -> Figures:
    """`CROWD` times the usual rate for `CROWD_S`, then a minute at the usual rate."""
    rate, rng = 0.2 * capacity_rps(answers, answers.largest), Random(seed)
    at_s, now = list[float](), 0.0
    start, end = 20.0, 20.0 + CROWD_S
    while now < end + 60.0:
        busy = start <= now < end
        now += rng.expovariate(rate * (CROWD if busy else 1.0))
        at_s.append(now)
    arrived = with_requests(answers, at_s, seed)
    found: Figures = {"crowd.rate_rps": rate * CROWD}
    for name in policies:
        world = World(
            answers,
            Goals(policy=policy_of(name, answers, {})),
            seed=seed,
            predictor=shipped(answers.fleet),
        )
        world.serve(arrived)
        world.finish()
        crowd = [r for r in world.rows if start <= r.at_s < end]
        found |= {f"crowd.{name}.{key}": v for key, v in _crowd_figures(world.rows, crowd).items()}
    return found


def _crowd_figures(rows: Sequence[Row], crowd: Sequence[Row]) -> Figures:
    latency = np.array([r.latency_s for r in crowd])
    good = np.array([r.latency_s <= GOODPUT_S for r in crowd])
    right = np.array([r.exact for r in crowd])
    after = [r.latency_s for r in rows if r.at_s >= crowd[-1].at_s + CROWD_S]
    return {
        "goodput_rps": float(good.sum()) / CROWD_S,
        "right_goodput_rps": float((good * right).sum()) / CROWD_S,
        "latency_p95_s": float(np.nanpercentile(latency, 95)),
        "after_p95_s": float(np.nanpercentile(after, 95)),
        "exact": float(right.mean()),
        "shed_ratio": float(np.mean([r.error == "shed" for r in crowd])),
        # Neither answered nor rejected because queues are full.
        "lost": float(sum(not r.slm and r.error != "shed" for r in rows)),
    }
