"""Parts of the served changes: goals under shifts, and wrong feedback that is undone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx

from load_tests.common.client import Question, ask
from load_tests.common.served import Service
from load_tests.common.workloads import Request
from load_tests.paper.changes import figures as figures_of
from load_tests.paper.changes.operator import Operator
from load_tests.paper.figures import GENERALIST, Figures, Record
from load_tests.paper.live import GENERAL, add_outcomes
from load_tests.paper.runs import MAX_TOKENS
from load_tests.paper.traffic import Traffic, client_of, drawn

SEED = 77
CAPACITY_REQUESTS, FULL, WARM_UP = 96, 16, 6
MIXES = (("intent", "extract", "shell"), ("reason", "sql", "mixed"))
# Goals, over the generalist's own energy and p95 latency: low enough that the stated weights alone
# miss them (`without_ratio`).
ENERGY_PART, LATENCY_PART = 0.7, 0.5
ACTOR_S = 6.0  # the knowledge actor's own period is 5 s


@dataclass(frozen=True, slots=True)
class Sizes:
    """Requests of each part."""

    alone: int = 64
    before: int = 72
    after: int = 240
    without: int = 64
    settled: int = 220
    broken: tuple[int, int] = (260, 400)
    learned_from: int = 120  # labels with swapped feedback after which the service may train
    mislearned: int = 460
    undone: int = 240


@dataclass(slots=True)
class Changes:
    """Records and figures of the served changes."""

    parts: dict[str, list[Record]] = field(default_factory=dict)
    figures: Figures = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)  # goal by shift
    reported: dict[str, Any] = field(default_factory=dict)  # the service's own reports, by part
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> list[Record]:
        """Every graded request of every part."""
        return [record for part in self.parts.values() for record in part]


async def goals(
    changes: Changes,
    operator: Operator,
    traffic: Traffic,
    rate: float,
    sizes: Sizes,
    state: Path,
) -> None:
    """The generalist alone; then for each shift ours with a goal before and after it, then ours
    without the goal."""
    workload = traffic.workload
    operator.set_goals(policy={"name": "single", "slm": GENERAL})
    alone = await traffic.send(
        "alone", drawn(workload, (), sizes.alone, SEED), rate, policy=GENERALIST
    )
    changes.parts["alone"] = alone
    await asyncio.sleep(2.0)
    add_outcomes(alone, state)
    for name, field_, metric, part, mixes, loads in (
        ("mix", "energy_per_request_j", "energy_j", ENERGY_PART, MIXES, (1.0, 1.0)),
        ("load", "e2e_p95_s", "latency_s", LATENCY_PART, ((), ()), (1.0, 2.0)),
    ):
        limit = changes.limits[name] = part * figures_of.measured(alone, metric)
        operator.set_goals(**{field_: limit})
        counts = (sizes.before, sizes.after)
        for when, count, tasks, load in zip(("before", "after"), counts, mixes, loads, strict=True):
            key = f"{name} {when}"
            places = drawn(workload, tasks, count, SEED + len(changes.parts))
            changes.parts[key] = await traffic.send(key, places, load * rate)
            changes.reported[key] = operator.targets()
            print(key, changes.reported[key], operator.get("/v1/goals")["weights"], flush=True)
        operator.set_goals()
        places = drawn(workload, mixes[1], sizes.without, SEED + 2)
        key = f"{name} without"
        changes.parts[key] = await traffic.send(key, places, loads[1] * rate)


def goal_figures(changes: Changes) -> None:
    """Add the figures of both shifts; the energy of their requests has to be known."""
    for name, metric in (("mix", "energy_j"), ("load", "latency_s")):
        parts = (changes.parts[f"{name} {when}"] for when in ("after", "without"))
        found = figures_of.goal(metric, changes.limits[name], *parts)
        (target,) = changes.reported[f"{name} after"]
        found |= {"goal": changes.limits[name]}
        found |= {f"reported_{k}": target[k] for k in ("measured", "held", "feasible")}
        changes.figures |= {f"live.shift.{name}.{k}": v for k, v in found.items()}


async def learning(
    changes: Changes, operator: Operator, traffic: Traffic, rate: float, sizes: Sizes
) -> None:
    """Swapped feedback until another predictor decides; then true feedback until it is undone."""
    good = _champion(operator.predictor())
    for name, swapped, count in (
        ("mislearned", True, sizes.mislearned),
        ("rollback", False, sizes.undone),
    ):
        deciding = _champion(operator.predictor())
        places = drawn(traffic.workload, (), count, SEED + 3 + swapped)
        async with _predictor_polled(traffic) as observed:
            changes.parts[name] = await traffic.send(
                name,
                places,
                rate,
                feedback_ratio=1.0,
                swapped=swapped,
                stop=lambda observed=observed, deciding=deciding: (  # type: ignore[misc]
                    bool(observed) and _champion(observed[-1][1]) != deciding
                ),
            )
            await asyncio.sleep(ACTOR_S)
        predictor = operator.predictor()
        shadows = [sent for sent, document in observed if document["challenger"]]
        changes.reported[name] = predictor
        changes.figures |= {
            f"live.{name}.requests": len(changes.parts[name]),
            f"live.{name}.shadow_after_requests": shadows[0] if shadows else None,
            f"live.{name}.champion_changed": _champion(predictor) != deciding,
            f"live.{name}.champion_is_the_first": _champion(predictor) == good,
        }
        print(await asyncio.to_thread(operator.calm, "predictors"), flush=True)
        if _champion(predictor) == deciding:
            return
    if changes.figures["live.rollback.champion_is_the_first"]:
        changes.figures["live.rollback_requests"] = len(changes.parts["rollback"])


def _champion(predictor: Mapping[str, Any]) -> str:
    return str(predictor["version"]).partition("+")[0]  # without the cold-start SLMs' part


@contextlib.asynccontextmanager
async def sending(
    service: Service, workload: Sequence[Request]
) -> AsyncIterator[tuple[Operator, Traffic]]:
    """An operator and a sender, after every SLM has been warmed up."""
    with contextlib.closing(Operator(service)) as operator:
        async with client_of(service.url) as client:
            slms = [s["id"] for s in operator.get("/v1/fleet")["slms"]]
            for slm in slms:
                sent = [Question(slm, one.messages, 16) for one in workload[:WARM_UP]]
                await asyncio.gather(*(ask(client, question) for question in sent))
            yield operator, Traffic(client, workload, Random(SEED))


@contextlib.asynccontextmanager
async def _predictor_polled(traffic: Traffic) -> AsyncIterator[list[tuple[int, dict[str, Any]]]]:
    """Poll the predictor of /v1/fleet: (requests sent so far, its document), growing."""
    observed: list[tuple[int, dict[str, Any]]] = []

    async def follow() -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):  # the next poll tries again
                document = (await traffic.client.get("/v1/fleet")).raise_for_status().json()
                observed.append((traffic.sent, document["predictor"]))
            await asyncio.sleep(0.5)

    task = asyncio.create_task(follow())
    try:
        yield observed
    finally:
        task.cancel()


async def capacity(traffic: Traffic) -> float:
    """Requests per second of the generalist with FULL requests always in flight."""
    waiting = iter(traffic.workload[:CAPACITY_REQUESTS])

    async def worker() -> None:
        for one in waiting:
            await ask(traffic.client, Question(GENERAL, one.messages, MAX_TOKENS))

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(FULL)))
    return CAPACITY_REQUESTS / (time.perf_counter() - started)
