"""A router that works on as many requests as it may, and engines that are killed or stopped.

The fleet is the test's own, because its router has a limit of two requests.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.served_fleet import ServedFleet, eventually, reference_config

SLM = "shell"
LIMIT = 2
CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "model": SLM,
    "messages": [{"role": "user", "content": "list all files"}],
    "max_tokens": 1000,
    "min_tokens": 1000,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def fleet() -> Iterator[ServedFleet]:
    """One SLM with two replicas, and one router."""
    config = reference_config(slms=(SLM,), two_replicas=SLM)
    config["applications"][0]["args"]["router"] = {
        "replicas": 1,
        "num_cpus": 0.1,
        "max_ongoing_requests": LIMIT,
    }
    with ServedFleet(config).running() as served:
        yield served


def test_while_generation_is_saturated_health_and_administration_answer(
    fleet: ServedFleet,
) -> None:
    with ExitStack() as streams:
        for _ in range(LIMIT):
            stream = httpx.stream("POST", fleet.url + CHAT, json={**LONG, "stream": True})
            next(streams.enter_context(stream).iter_lines())
        refused = fleet.post(CHAT, LONG)
        others = {
            path: httpx.get(fleet.url + path, timeout=5.0).status_code
            for path in ("/health", "/metrics", "/v1/fleet", "/v1/goals", "/v1/models")
        }
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "router_saturated"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 500
    assert set(others.values()) == {200}, others
    metrics = httpx.get(f"{fleet.url}/metrics", timeout=5.0).text
    assert 'calm_refused_requests_total{kind="router_full",slm="none"} 1.0' in metrics
    eventually("places are free again", lambda: fleet.chat("hi", SLM).status_code == 200)


def busy_engine(fleet: ServedFleet) -> int | None:
    """The engine that computes, None while no or both do."""
    engines = [psutil.Process(pid) for pid in fleet.engine_pids(SLM)]
    before = [sum(e.cpu_times()[:2]) for e in engines]
    threading.Event().wait(0.3)
    busy = [
        e.pid for e, was in zip(engines, before, strict=True) if sum(e.cpu_times()[:2]) - was > 0.05
    ]
    return busy[0] if len(busy) == 1 else None


@pytest.mark.timeout(300)
def test_a_request_that_was_alone_in_an_engine_that_was_killed_gets_another_one(
    fleet: ServedFleet,
) -> None:
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(fleet.post, CHAT, LONG)
        killed = eventually("an engine works on it", lambda: busy_engine(fleet))
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        answer = pending.result(timeout=120.0)
    assert answer.status_code == 200, answer.text
    outcome = fleet.outcome(answer.headers["x-calm-decision-id"])
    assert [(a.slm_id, a.failure) for a in outcome.failed_attempts] == [(SLM, "engine_died")]
    assert (outcome.status, outcome.failure) == ("ok", "")
