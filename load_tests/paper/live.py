"""The served half of the `paper` experiment: the reference fleet under one policy after another.

Energy is what the service attributed to each request (`energy_j` of its outcome), read from the
outcome store after the service has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from calm_serve.knowledge import OutcomeStore
from load_tests.common import arrivals
from load_tests.common.served import fleet_file, served
from load_tests.common.workloads import Request
from load_tests.paper.figures import (
    AS_GENERALIST,
    AS_PAPER,
    GENERALIST,
    OURS,
    PAPER,
    POLICIES,
    SHARES,
    Record,
)
from load_tests.paper.runs import Arrival, Runner

GENERAL = "general"  # the SLM of the policy `generalist`
# Mean offered rate, over the generalist's capacity with `FULL` requests always in flight; in the
# highest minute of the day the rate is 2.5 times the mean.
LOAD_RATIO = 0.4
FULL = 16
CAPACITY_REQUESTS = 128
# With quality as a target, the weights only express cost: a second is worth six times the whole
# range of quality. `min_quality` is the other policy's quality so far; see `runs.Runner`.
SAVING = {"policy": {"name": "calm"}, "latency_weight_per_s": 6.0, "energy_weight_per_j": 0.6}
WARM_UP = 8  # requests for each SLM
NEVER = 1_000_000  # min_outcomes that is not reached, so that the service does not train
SEED = 98
OUTCOMES = 200_000  # most that are read back

Section = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Requests for each policy by scenario, and the number of blocks that they are cut into."""

    day: int
    trace: int
    serial: int
    half: int
    blocks: int = 4


@dataclass(slots=True)
class Live:
    """All records of the served half, with figures of the machine and the load generator."""

    records: list[Record] = field(default_factory=list)
    capacity_per_s: float = 0.0  # of the generalist alone
    cores_busy: dict[str, float] = field(default_factory=dict)  # by `scenario.policy`
    client_cpu_ratio: float = 0.0
    late_s: float = 0.0
    variation: dict[str, float] = field(default_factory=dict)  # of the arrivals' gaps
    fleet: dict[str, Any] = field(default_factory=dict)  # `/v1/fleet` at the end, by scenario

    @property
    def rate_per_s(self) -> float:
        """Mean rate of the open loops."""
        return LOAD_RATIO * self.capacity_per_s


def policies(names: Sequence[str]) -> dict[str, Section]:
    """The changes of the service's goals that select each policy."""
    every: dict[str, Section] = {
        OURS: {"policy": {"name": "calm"}},
        GENERALIST: {"policy": {"name": "single", "slm": GENERAL}},
        PAPER: {"policy": {"name": "paper"}},
        SHARES: {"policy": {"name": "shares"}},
        AS_GENERALIST: SAVING,
        AS_PAPER: SAVING,
    }
    return {name: every[name] for name in names}


def sequence(at_s: Sequence[float], size: int, rng: Random) -> list[Arrival]:
    """Arrivals at these times, with `size` requests of the workload in random order."""
    order = rng.sample(range(size), min(size, len(at_s)))
    return [Arrival(i, order[i % len(order)], at) for i, at in enumerate(at_s)]


def hot(
    live: Live,
    workload: Sequence[Request],
    trace: Sequence[float],
    sizes: Sizes,
    names: Sequence[str],
) -> None:
    """All models hot: the day, the trace if there is one, and one request at a time."""

    async def run(runner: Runner) -> None:
        live.capacity_per_s = await runner.capacity(GENERAL, CAPACITY_REQUESTS, FULL)
        rate = live.rate_per_s
        print(
            f"the generalist alone answers {live.capacity_per_s:.2f} requests/s with {FULL} in "
            f"flight; offered: {rate:.2f}/s on the mean, a load of {LOAD_RATIO:.2f}",
            flush=True,
        )
        rng = Random(SEED)
        at_s = {"hot": arrivals.day(sizes.day, rate, rng)}
        if trace and sizes.trace:
            start = rng.randrange(len(trace) - sizes.trace)
            at_s["azure"] = arrivals.scaled(trace, start, sizes.trace, rate)
        for scenario, times in at_s.items():
            live.variation[scenario] = round(arrivals.variation(times), 2)
            await runner.open_loop(scenario, sequence(times, len(workload), rng), sizes.blocks)
        if sizes.serial:
            requests = rng.sample(range(len(workload)), sizes.serial)
            await runner.serial("serial", requests, sizes.blocks)

    _serve(live, "hot", workload, policies(names), run, {})


def half(
    live: Live, workload: Sequence[Request], sizes: Sizes, residency: Mapping[str, Any]
) -> None:
    """Memory for about half the fleet: the paper's policy with the paper's cache, then ours."""
    for name, own in (("half_memory_lru", "lru"), ("half_memory", "calm")):
        names = [p for p in POLICIES if (p == PAPER) == (own == "lru")]

        async def run(runner: Runner) -> None:
            rng = Random(SEED + 1)
            times = arrivals.day(sizes.half, live.rate_per_s, rng)
            order = sequence(times, len(workload), rng)
            # No turns: one policy's demand would distort the cache and the forecast of the next.
            await runner.open_loop("half_memory", order, 1)

        _serve(live, name, workload, policies(names), run, {**residency, "policy": own})


def _serve(
    live: Live,
    name: str,
    workload: Sequence[Request],
    sections: Mapping[str, Section],
    run: Any,
    residency: Mapping[str, Any],
) -> None:
    def change(args: dict[str, Any]) -> None:
        args["learning"]["min_outcomes"] = NEVER
        if residency:
            args["residency"] = dict(residency)

    async def serve(url: str) -> Runner:
        runner = Runner(url, workload, sections, live.records)
        try:
            await runner.warm_up([s["id"] for s in fleet_file("reference")["slms"]], WARM_UP)
            await run(runner)
            await asyncio.sleep(2.0)  # for the router's last batch of outcomes
            async with httpx.AsyncClient(base_url=url, timeout=30.0) as client:
                live.fleet[name] = (await client.get("/v1/fleet")).raise_for_status().json()
        finally:
            await runner.close()
        return runner

    with TemporaryDirectory(prefix="calm") as folder:
        with served(change=change, state=Path(folder)) as url:
            runner = asyncio.run(serve(url))
        add_outcomes(runner.records, Path(folder))
    live.records += runner.records
    live.client_cpu_ratio = max(live.client_cpu_ratio, runner.observed.client_cpu_ratio)
    live.late_s = max(live.late_s, runner.observed.late_s)
    for key, values in runner.observed.cores_busy.items():
        live.cores_busy[key] = round(sum(values) / len(values), 3)


def add_outcomes(records: Sequence[Record], state: Path) -> None:
    """Add from the outcome store each request's energy and preferred SLM."""
    store = OutcomeStore(f"sqlite:///{(state / 'outcomes.sqlite').absolute()}")
    try:
        outcomes = {o.outcome_id: o for o in store.recent(OUTCOMES)}
    finally:
        store.close()
    for record in records:
        outcome = outcomes.get(record.decision_id)
        if outcome is None:
            continue
        record.preferred = outcome.decision.preferred
        record.preferred_hot = outcome.decision.preferred_hot
        if outcome.engine.energy_j is not None:
            record.energy_j, record.energy_source = (
                outcome.engine.energy_j,
                outcome.engine.energy_source,
            )
