"""Chat requests to a running endpoint, pinned or routed, with bounded concurrency."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tqdm import tqdm

from deployments.reference_fleet.corpora.phrasing import Message

TIMEOUT_S = 180.0
# More than the longest right answer of each task; a truncated answer would count as wrong.
MAX_TOKENS = {"sql": 320, "mixed": 400, "extract": 200, "shell": 120, "reason": 140, "intent": 40}
MAX_TOKENS |= {"choice": 48, "knowledge": 48}
OTHER_MAX_TOKENS = 80


@dataclass(frozen=True)
class Question:
    """A request: `model` is an SLM's id, `slm:adapter`, or `auto`."""

    model: str
    messages: list[Message]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """An answer; `latency_s` is measured by the client, from sending to the last byte."""

    text: str
    slm: str
    reason: str
    decision_id: str
    latency_s: float
    prompt_tokens: int
    completion_tokens: int


def max_tokens(task: str) -> int:
    """Limit of the answer's tokens for a task."""
    return MAX_TOKENS.get(task, OTHER_MAX_TOKENS)


async def ask(client: httpx.AsyncClient, question: Question, **body: Any) -> Answer:
    """Send one question, decoded greedily. Raises httpx.HTTPStatusError for an error status."""
    sent = time.perf_counter()
    got = await client.post(
        "/v1/chat/completions",
        json={
            "model": question.model,
            "messages": question.messages,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            **body,
        },
    )
    took = time.perf_counter() - sent
    got.raise_for_status()
    document = got.json()
    return Answer(
        document["choices"][0]["message"]["content"] or "",
        got.headers["x-calm-model"],
        got.headers["x-calm-reason"],
        got.headers["x-calm-decision-id"],
        took,
        int(document["usage"]["prompt_tokens"]),
        int(document["usage"]["completion_tokens"]),
    )


async def ask_all(
    url: str, questions: Sequence[Question], concurrency: int, label: str
) -> list[Answer]:
    """The answers in the order of the questions; shows a progress bar."""
    slots = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        with tqdm(total=len(questions), desc=label, mininterval=1.0) as bar:

            async def one(question: Question) -> Answer:
                async with slots:
                    answer = await ask(client, question)
                bar.update()
                return answer

            return await asyncio.gather(*(one(q) for q in questions))
