"""Graded requests to a running service: one policy at a time, in blocks that take turns.

All policies have the same requests at the same times. The sequence of arrivals is cut into blocks;
each block is run under every policy before the next block, each time starting with another policy,
so that a change of the machine's speed affects all policies alike. Policies are switched by `PUT
/v1/goals`.
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
# The same for every task: the limit is a feature and must not reveal the task.
MAX_TOKENS = 320

# Policy -> the policy whose quality is its target. The margin is added because measured quality
# scatters around a target.
TARGETS = {AS_GENERALIST: GENERALIST, AS_PAPER: PAPER}
TARGET_MARGIN = 0.02


@dataclass(slots=True)
class Observed:
    """The machine's busy cores by `scenario.policy`, and figures of the load generator."""

    cores_busy: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    client_cpu_ratio: float = 0.0  # of one core, the highest of any run
    late_s: float = 0.0  # largest delay between a request's due time and its sending


@dataclass(frozen=True, slots=True)
class Arrival:
    """One place of a sequence: a request of the workload (by index) and when it is due."""

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

    `policies` maps names to changes of the service's goals. The shares of `shares` and the quality
    targets are those that another policy has had so far, so that policy has to run first.
    `earlier` are records of earlier runs.
    """

    def __init__(
        self,
        url: str,
        workload: Sequence[Request],
        policies: Mapping[str, Mapping[str, Any]],
        earlier: Sequence[Record] = (),
    ) -> None:
        self.observed = Observed()
        self._earlier = earlier
        self.records: list[Record] = []
        self._workload = workload
        self._policies = dict(policies)
        self._goals: dict[str, Any] = {}  # as the service was started with
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def warm_up(self, slms: Sequence[str], each: int) -> None:
        """Send a few requests to every SLM, so that no measured request includes warm-up."""
        for slm in slms:
            sent = [Question(slm, r.messages, 16) for r in self._workload[:each]]
            await asyncio.gather(*(ask(self._client, question) for question in sent))

    async def capacity(self, slm: str, requests: int, concurrency: int) -> float:
        """Requests per second of one SLM with `concurrency` always in flight."""
        waiting = iter(self._workload[:requests])

        async def worker() -> None:
            for one in waiting:
                await ask(self._client, Question(slm, one.messages, MAX_TOKENS))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return requests / (time.perf_counter() - started)

    async def open_loop(self, scenario: str, arrivals: Sequence[Arrival], blocks: int) -> None:
        """Run every arrival under every policy, independently of earlier answers."""
        await self._in_turns(scenario, blocks_of(arrivals, blocks), MAX_CONNECTIONS)

    async def serial(self, scenario: str, requests: Sequence[int], blocks: int) -> None:
        """Run one request at a time, each as soon as the one before it is answered."""
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
            quality = quality_of([*self._earlier, *self.records], TARGETS[policy])
            change["min_quality"] = min(quality + TARGET_MARGIN, 1.0)
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
                # In a serial run a request is due when the one before it has ended.
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
                    self.observed.late_s = max(self.observed.late_s, time.perf_counter() - due)
                group.create_task(one(arrival, due))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        busy = psutil.cpu_percent() / 100.0 * (psutil.cpu_count() or 1)
        gc.enable()
        self.observed.cores_busy[f"{scenario}.{policy}"].append(busy)
        self.observed.client_cpu_ratio = max(self.observed.client_cpu_ratio, cpu / wall)
        for record, text in answers:
            self._grade(record, text)
        self.records += [record for record, _ in answers]

    async def _ask(self, record: Record) -> str | None:
        """The answer's text, or None for an error, which is then in the record."""
        question = Question("auto", self._workload[record.request].messages, MAX_TOKENS)
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
        row = self._workload[record.request].row
        record.exact = marks(row.task, text, list(row.answers))["exact"]
        record.credit = credit(row.task, text, list(row.answers))


def quality_of(records: Sequence[Record], policy: str) -> float:
    """Mean credit of a policy's answers in all scenarios. Raises ValueError if it has none yet."""
    credits = [r.credit for r in records if r.policy == policy]
    if not credits:
        raise ValueError(f"{policy} has no answers yet, so its quality is not known")
    return sum(credits) / len(credits)


def shares_of(records: Sequence[Record], scenario: str) -> dict[str, float]:
    """Each SLM's share of the requests that ours routed in a scenario."""
    counts = Counter(r.slm for r in records if (r.scenario, r.policy) == (scenario, OURS) and r.slm)
    return {slm: count / counts.total() for slm, count in counts.items()}
