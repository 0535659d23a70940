"""Graded requests to a running service: one policy at a time, in blocks that take turns.

All policies have the same requests at the same times. The sequence of arrivals is cut into blocks,
and each block is run for every policy before the next one, with another policy first each time, so
that a machine that drifts does so for all of them. A policy is switched by `PUT /v1/goals`.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from tqdm import tqdm

from deployments.reference_fleet.grading.marks import credit, marks
from load_tests.common.client import Question, ask
from load_tests.common.workloads import Request
from load_tests.paper.figures import (
    AS_GENERALIST,
    AS_PAPER,
    GENERALIST,
    OURS,
    PAPER,
    SHARES,
    Record,
)

TIMEOUT_S = 120.0
MAX_CONNECTIONS = 256
# The same for every task: the limit is a feature, and must not tell the task.
MAX_TOKENS = 320

# Whose quality is another policy's target, and by how much it is to be better: what is measured
# scatters around a target.
TARGETS = {AS_GENERALIST: GENERALIST, AS_PAPER: PAPER}
BETTER = 0.02


@dataclass(slots=True)
class Seen:
    """What was seen beside the answers, by policy: the machine's busy cores, and the generator."""

    cores_busy: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    client_cpu_ratio: float = 0.0  # of one core, the highest of any run
    late_s: float = 0.0  # the latest that a request was sent after it was due


@dataclass(frozen=True, slots=True)
class Arrival:
    """One place of a sequence: which request of the workload, and when."""

    place: int
    request: int
    due_s: float


def blocks_of(arrivals: Sequence[Arrival], count: int) -> list[list[Arrival]]:
    """The sequence cut into `count` parts of equal length in time."""
    length_s = arrivals[-1].due_s / count
    found: list[list[Arrival]] = [[] for _ in range(count)]
    for one in arrivals:
        found[min(int(one.due_s / length_s), count - 1)].append(one)
    return [block for block in found if block]


class Runner:
    """Sends the workload to one service under one policy after another.

    `policies` are changes of the service's goals by name; the shares of `shares`, and the quality
    that is a target, are those that another policy has had so far, so that one goes first. `before`
    are records of earlier runs.
    """

    def __init__(
        self,
        url: str,
        asked: Sequence[Request],
        policies: Mapping[str, Mapping[str, Any]],
        before: Sequence[Record] = (),
    ) -> None:
        self.seen = Seen()
        self._before = before
        self.records: list[Record] = []
        self._asked = asked
        self._policies = dict(policies)
        self._goals: dict[str, Any] = {}  # the service's own
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def warm_up(self, slms: Sequence[str], each: int) -> None:
        """Ask every SLM, so that nobody's first request pays for a first time."""
        for slm in slms:
            sent = [Question(slm, r.messages, 16) for r in self._asked[:each]]
            await asyncio.gather(*(ask(self._client, question) for question in sent))

    async def capacity(self, slm: str, requests: int, concurrency: int) -> float:
        """Requests per second of one SLM with `concurrency` always in flight."""
        waiting = iter(self._asked[:requests])

        async def worker() -> None:
            for one in waiting:
                await ask(self._client, Question(slm, one.messages, MAX_TOKENS))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return requests / (time.perf_counter() - started)

    async def open_loop(self, scenario: str, arrivals: Sequence[Arrival], blocks: int) -> None:
        """Every policy has every arrival, whatever became of those before it."""
        await self._in_turns(scenario, blocks_of(arrivals, blocks), MAX_CONNECTIONS)

    async def serial(self, scenario: str, requests: Sequence[int], blocks: int) -> None:
        """One request at a time, each as soon as the one before it has its answer."""
        arrivals = [Arrival(i, request, float(i)) for i, request in enumerate(requests)]
        await self._in_turns(scenario, blocks_of(arrivals, blocks), 1)

    async def _in_turns(
        self, scenario: str, blocks: Sequence[Sequence[Arrival]], concurrency: int
    ) -> None:
        names = list(self._policies)
        total = len(names) * sum(len(block) for block in blocks)
        with tqdm(total=total, desc=scenario, mininterval=1.0) as bar:
            for turn, block in enumerate(blocks):
                for i in range(len(names)):
                    policy = names[(turn + i) % len(names)]
                    await self._switch(scenario, policy)
                    await self._run(scenario, policy, block, concurrency, bar)

    async def _switch(self, scenario: str, policy: str) -> None:
        change = dict(self._policies[policy])
        if policy == SHARES:
            shares = shares_of(self.records, scenario)
            change["policy"] = {**change["policy"], "shares": shares}
        if policy in TARGETS:
            had = quality_of([*self._before, *self.records], TARGETS[policy])
            change["min_quality"] = min(had + BETTER, 1.0)
        if not self._goals:
            got = (await self._client.get("/v1/goals")).raise_for_status()
            self._goals = got.json()["goals"]
        put = await self._client.put("/v1/goals", json={**self._goals, **change})
        put.raise_for_status()

    async def _run(
        self,
        scenario: str,
        policy: str,
        block: Sequence[Arrival],
        concurrency: int,
        bar: tqdm[Any],
    ) -> None:
        slots = asyncio.Semaphore(concurrency)
        answers: list[tuple[Record, str]] = []

        async def one(arrival: Arrival, due: float) -> None:
            record = Record(scenario, policy, arrival.place, arrival.request, arrival.due_s)
            async with slots:
                # Of a serial run, what counts is the service: nobody is due before the last ended.
                since = time.perf_counter() if concurrency == 1 else due
                text = await self._ask(record)
                record.latency_s = time.perf_counter() - since if text is not None else float("nan")
            answers.append((record, text or ""))
            bar.update()

        gc.collect()
        gc.disable()
        psutil.cpu_percent()
        start, cpu = time.perf_counter(), time.process_time()
        origin = block[0].due_s
        async with asyncio.TaskGroup() as group:
            for arrival in block:
                due = start + arrival.due_s - origin
                if concurrency > 1 and (delay := due - time.perf_counter()) > 0:
                    await asyncio.sleep(delay)
                if concurrency > 1:
                    self.seen.late_s = max(self.seen.late_s, time.perf_counter() - due)
                group.create_task(one(arrival, due))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        busy = psutil.cpu_percent() / 100.0 * (psutil.cpu_count() or 1)
        gc.enable()
        self.seen.cores_busy[f"{scenario}.{policy}"].append(busy)
        self.seen.client_cpu_ratio = max(self.seen.client_cpu_ratio, cpu / wall)
        for record, text in answers:
            self._grade(record, text)
        self.records += [record for record, _ in answers]

    async def _ask(self, record: Record) -> str | None:
        """The answer's text, None for an error, which the record then names."""
        question = Question("auto", self._asked[record.request].messages, MAX_TOKENS)
        try:
            answer = await ask(self._client, question)
        except httpx.HTTPStatusError as error:
            record.error = f"status {error.response.status_code}"
            return None
        except httpx.HTTPError as error:
            record.error = type(error).__name__
            return None
        record.slm, record.reason = answer.slm, answer.reason
        record.decision_id, record.output_tokens = answer.decision_id, answer.completion_tokens
        return answer.text

    def _grade(self, record: Record, text: str) -> None:
        if record.error:
            return
        row = self._asked[record.request].row
        record.exact = marks(row.task, text, list(row.answers))["exact"]
        record.credit = credit(row.task, text, list(row.answers))


def quality_of(records: Sequence[Record], policy: str) -> float:
    """Mean credit of a policy's answers in all scenarios; ValueError before it had any."""
    credits = [r.credit for r in records if r.policy == policy]
    if not credits:
        raise ValueError(f"{policy} has answered nothing yet, so its quality is not known")
    return sum(credits) / len(credits)


def shares_of(records: Sequence[Record], scenario: str) -> dict[str, float]:
    """Each SLM's share of what ours sent in a scenario."""
    counts = Counter(r.slm for r in records if (r.scenario, r.policy) == (scenario, OURS) and r.slm)
    return {slm: count / counts.total() for slm, count in counts.items()}
