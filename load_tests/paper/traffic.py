"""Graded traffic for the served changes of the `paper` experiment, with feedback on the answers.

Requests are a Poisson process and are sent when they are due. Every answer is graded against its
held-out row, and the grades of a given share of them are posted to `/v1/feedback`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import httpx
from tqdm import tqdm

from deployments.reference_fleet.grading.marks import credit, marks
from load_tests.common.client import Answer, Question, ask
from load_tests.common.workloads import Request
from load_tests.paper.figures import OURS, Record
from load_tests.paper.runs import MAX_CONNECTIONS, MAX_TOKENS, TIMEOUT_S

Stop = Callable[[], bool]
Score = Callable[[float], float]  # credit of an answer -> score of the feedback on it


@dataclass(slots=True)
class Traffic:
    """Sends parts of the workload to one service; `records` has every request in order."""

    client: httpx.AsyncClient
    workload: Sequence[Request]
    rng: Random
    records: list[Record] = field(default_factory=list)
    sent: int = 0  # requests of the current part
    late_s: float = 0.0  # largest delay between a request's due time and its sending
    feedback: int = 0  # grades posted

    async def send(
        self,
        scenario: str,
        requests: Sequence[int],
        rate_per_s: float,
        *,
        feedback_ratio: float = 0.0,
        swapped: bool = False,
        policy: str = OURS,
        stop: Stop | None = None,
    ) -> list[Record]:
        """Send these requests of the workload. Returns their records in the order of arrival.

        `swapped` feedback scores good answers as bad and bad ones as good. `stop` is called before
        each request; True ends the part early.
        """
        found: list[Record] = []
        self.sent = 0
        start, due_s = time.perf_counter(), 0.0
        with tqdm(total=len(requests), desc=scenario, mininterval=1.0) as bar:
            async with asyncio.TaskGroup() as group:
                for place, request in enumerate(requests):
                    due_s += self.rng.expovariate(rate_per_s)
                    # Drawn for every request, so that it does not depend on other answers.
                    has_feedback = self.rng.random() < feedback_ratio
                    score = _swapped if swapped else _truth
                    if (delay_s := start + due_s - time.perf_counter()) > 0:
                        await asyncio.sleep(delay_s)
                    if stop is not None and stop():
                        break
                    self.late_s = max(self.late_s, time.perf_counter() - start - due_s)
                    record = Record(scenario, policy, place, request, due_s)
                    found.append(record)
                    self.sent = place + 1
                    group.create_task(
                        self._one(record, start + due_s, score if has_feedback else None, bar)
                    )
        self.records += found
        return found

    async def _one(self, record: Record, due: float, score: Score | None, bar: tqdm[None]) -> None:
        one = self.workload[record.request]
        try:
            answer = await ask(self.client, Question("auto", one.messages, MAX_TOKENS))
            record.latency_s = time.perf_counter() - due
            self._grade(record, answer)
            if score is not None:
                body = {"decision_id": record.decision_id, "score": score(record.credit)}
                (await self.client.post("/v1/feedback", json=body)).raise_for_status()
                self.feedback += 1
        except httpx.HTTPStatusError as error:
            record.error = f"status {error.response.status_code}"
        except httpx.HTTPError as error:
            record.error = type(error).__name__
        bar.update()

    def _grade(self, record: Record, answer: Answer) -> None:
        row = self.workload[record.request].row
        record.slm, record.reason = answer.slm, answer.reason
        record.decision_id, record.output_tokens = answer.decision_id, answer.completion_tokens
        record.exact = marks(row.task, answer.text, list(row.answers))["exact"]
        record.credit = credit(row.task, answer.text, list(row.answers))


def _truth(credit: float) -> float:
    return credit


def _swapped(credit: float) -> float:
    return 1.0 - credit


def client_of(url: str) -> httpx.AsyncClient:
    """An HTTP client with as many connections as the experiment needs."""
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)


def drawn(workload: Sequence[Request], tasks: Sequence[str], count: int, seed: int) -> list[int]:
    """`count` random indices into the workload, of these tasks; () means all tasks.

    Every index of the pool is drawn once before any is drawn again.
    """
    pool = [i for i, one in enumerate(workload) if not tasks or one.row.task in tasks]
    rng = Random(seed)
    found: list[int] = []
    while len(found) < count:
        found += rng.sample(pool, len(pool))
    return found[:count]
