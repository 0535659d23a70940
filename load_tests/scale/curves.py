"""Decision cost over offered load, requests seen, candidates and replicas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from time import thread_time_ns
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from calm_serve.prediction import LightGBMPredictor, MetadataPrior
from calm_serve.replicas import ReplicaRequest, rank_for_prompt
from calm_serve.testing import FakeClock, make_replica
from calm_serve.types import Outcome
from deployments.knowledge.outcome_outbox import OutcomeOutbox
from deployments.router.live_state import LiveView
from load_tests.decision.world import World
from load_tests.scale.router import RouterProcess
from load_tests.scale.simulation import (
    SLOTS,
    Cluster,
    Simulation,
    Traffic,
    spread,
)
from load_tests.scale.state import settle, sizes

Figures = dict[str, Any]

UTILISATION = 0.7
OFFERED = {10: (4, 4), 100: (4, 16), 1_000: (8, 64), 10_000: (16, 256), 100_000: (32, 1_000)}
"""Requests per second offered -> SLMs and replicas over all of them."""
RPS_PER_ROUTER = 1_600  # so 100,000 requests/s need 63 processes
MIN_REQUESTS = 3_000
FILLS = 2  # a point lasts for this many times the cluster's requests in flight

SEEN_SLMS, SEEN_REPLICAS, SEEN_RPS = 4, 16, 100.0
CHECKPOINTS = 10
SETTLE_EVERY = 128  # requests between two runs of the outcome outbox's task

REPLICAS = (4, 16, 64, 256, 1_000)
PREFIX_BLOCKS = 16


def measure_offered(worlds: Mapping[int, World], seed: int) -> Figures:
    """Cost and waiting at every offered load, on a cluster with `UTILISATION`."""
    figures: Figures = {}
    for rate, (slms, replicas) in tqdm(OFFERED.items(), desc="offered load", unit="point"):
        world, slots = worlds[slms], SLOTS * replicas
        predictor = predictor_of(world)
        shares = spread(world.fleet, predictor, replicas, seed)
        cluster = Cluster(world.fleet, shares, UTILISATION * slots / rate, seed)
        routers = math.ceil(rate / RPS_PER_ROUTER)
        simulation = Simulation(
            world.fleet, predictor, cluster, routers=routers, rate_rps=rate, seed=seed
        )
        requests = max(MIN_REQUESTS, int(FILLS * UTILISATION * slots))
        for _ in range(requests):
            simulation.step()
        record, half = simulation.record, requests // 2
        mean_us = (sum(record.decide_ns) + sum(record.choose_ns)) / requests / 1000
        name = f"offered.{rate}"
        figures |= cost(f"{name}.decide", record.decide_ns[half:])
        figures |= cost(f"{name}.choose", record.choose_ns[half:])
        figures |= {
            f"{name}.routers": routers,
            f"{name}.requests": requests,
            f"{name}.router_cores": round(mean_us * rate / 1e6, 2),
            f"{name}.service_ms": round(UTILISATION * slots / rate * 1000, 1),
            f"{name}.p99_wait_ratio": round(
                float(np.quantile(record.wait_s[half:], 0.99)) * rate / (UTILISATION * slots), 3
            ),
            f"{name}.sent_to_full_share": round(record.rejections / requests, 4),
        }
    return figures


async def measure_seen(world: World, requests: int, seed: int, folder: Path) -> Figures:
    """Cost and state of one router process over `requests` requests, by tenths."""
    predictor = predictor_of(world)
    shares = spread(world.fleet, predictor, SEEN_REPLICAS, seed)
    service_s = UTILISATION * SLOTS * SEEN_REPLICAS / SEEN_RPS
    cluster = Cluster(world.fleet, shares, service_s, seed)
    simulation = Simulation(
        world.fleet, predictor, cluster, routers=1, rate_rps=SEEN_RPS, seed=seed
    )
    router = simulation.routers[0]
    outbox = OutcomeOutbox(_acknowledge, folder / "outcomes.jsonl")
    outbox.start()
    parts = {
        "decision_log": router.selector,
        "live_view": router.view,
        "windows": router.stats,
        "metrics": router.metrics,
        "outcomes": outbox,
    }
    tenth, figures = requests // CHECKPOINTS, {"seen.requests": requests}
    for number in tqdm(range(1, requests + 1), desc="requests seen", unit="request"):
        for outcome in simulation.step():
            outbox.add(outcome)
        if number % SETTLE_EVERY == 0:
            await settle()
        if number % tenth == 0:
            kept = sizes(parts, (world.fleet, predictor, simulation.clock))
            figures |= _state_figures(number // tenth, kept)
    await outbox.stop()
    figures |= _tenths(simulation, tenth)
    blocks = [len(router.view.estimator(f"slm-{s.id}").index) for s in world.fleet.slms]
    return figures | {"seen.prefix_blocks": blocks}


def _state_figures(tenth: int, kept: Mapping[str, tuple[int, int]]) -> Figures:
    figures = {f"seen.{tenth}.{name}_bytes": found[0] for name, found in kept.items()}
    figures |= {f"seen.{tenth}.{name}_objects": found[1] for name, found in kept.items()}
    return figures | {f"seen.{tenth}.state_bytes": sum(found[0] for found in kept.values())}


def _tenths(simulation: Simulation, tenth: int) -> Figures:
    figures: Figures = {}
    record = simulation.record
    for i in range(CHECKPOINTS):
        part = slice(i * tenth, (i + 1) * tenth)
        figures |= cost(f"seen.{i + 1}.decide", record.decide_ns[part])
        figures |= cost(f"seen.{i + 1}.choose", record.choose_ns[part])
    return figures


def measure_candidates(worlds: Mapping[int, World], turns: int, seed: int) -> Figures:
    """Cost of a scored decision by the number of SLMs, all sizes in turn."""
    cases = {}
    for slms, world in worlds.items():
        predictor = predictor_of(world)
        states = {s.id: [make_replica(f"{s.id}#0")] for s in world.fleet.slms}
        router = RouterProcess(world.fleet, predictor, states, FakeClock(), Random(seed))
        cases[slms] = router, Traffic(world.fleet, seed, paths=("scored",), chars=(400,))
    samples: dict[int, list[int]] = {slms: [] for slms in worlds}
    for number in tqdm(range(turns), desc="candidates", unit="turn"):
        for slms, (router, traffic) in cases.items():
            raw, headers = next(traffic)
            start = thread_time_ns()
            router.decide(raw, headers, f"c{number}")
            samples[slms].append(thread_time_ns() - start)
    figures: Figures = {}
    for slms, found in samples.items():
        figures |= cost(f"candidates.{slms}", found)
    return figures


class ReplicaCase:
    """One SLM with `count` replicas, whose prompts are new or share a prefix in the index."""

    def __init__(self, count: int, shared: bool, seed: int) -> None:
        rng = Random(seed)
        self.name = f"replicas.{count}.{'shared' if shared else 'new'}"
        self._shared, self._random = shared, rng
        self._view = LiveView(FakeClock())
        ids = [f"replica-{i:04}" for i in range(count)]
        lengths = {i: rng.randrange(16) for i in ids}
        self._view.attach("slm", lengths.get)
        self._view.update_replicas("slm", [make_replica(i) for i in ids])
        # Every replica has served the system prompt, half of them a longer prefix: two long lists
        # of replicas, which the index has to intersect.
        estimator, self._chain = self._view.estimator("slm"), tuple(range(1, PREFIX_BLOCKS + 1))
        for position, replica_id in enumerate(ids if shared else ()):
            length = PREFIX_BLOCKS if position % 2 else PREFIX_BLOCKS // 2
            estimator.sent(replica_id, self._chain[:length], 32 * length, replica_id)

    def choose(self, number: int) -> int:
        """Nanoseconds to choose a replica and to count the request, as in `ReplicaRouter`."""
        chain = (*self._chain, 1000 + number) if self._shared else (1000 + number,)
        tokens = 32 * len(chain)
        request = ReplicaRequest(
            str(number),
            prefix_family=f"{chain[min(1, len(chain) - 1)]:08x}",
            prompt_tokens=tokens,
        )
        estimator = self._view.estimator("slm")
        start = thread_time_ns()
        groups = rank_for_prompt(
            request,
            chain,
            self._view.replicas("slm"),
            estimator,
            local_node_id="",
            random=self._random,
        )
        estimator.sent(str(number), chain, tokens, groups[0][0])
        return thread_time_ns() - start


def measure_replicas(turns: int, seed: int) -> Figures:
    """Cost of the replica choice by the number of one SLM's replicas, all sizes in turn."""
    cases = [ReplicaCase(n, shared, seed) for n in REPLICAS for shared in (False, True)]
    samples: dict[str, list[int]] = {case.name: [] for case in cases}
    for number in tqdm(range(turns), desc="replicas", unit="turn"):
        for case in cases:
            samples[case.name].append(case.choose(number))
    figures: Figures = {}
    for name, found in samples.items():
        figures |= cost(name, found)
    return figures


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms: 1 is linear, 0 is flat."""
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 3)


def cost(name: str, nanoseconds: ArrayLike) -> Figures:
    """Median and 99th percentile in microseconds."""
    p50, p99 = np.quantile(np.asarray(nanoseconds), (0.5, 0.99)) / 1000
    return {f"{name}.p50_us": round(float(p50), 1), f"{name}.p99_us": round(float(p99), 1)}


def predictor_of(world: World) -> LightGBMPredictor:
    """The world's predictor."""
    return LightGBMPredictor(world.artifact, MetadataPrior())


async def _acknowledge(_rows: Sequence[Outcome]) -> None:
    """A knowledge actor that acknowledges at once."""
