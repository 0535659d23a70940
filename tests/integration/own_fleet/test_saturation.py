"""A router that works on as many requests as it may, and engines that are killed or stopped.

The fleet is the test's own, because its router has a limit of two requests.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    "max_tokens": 1500,
    "min_tokens": 1500,
    "ignore_eos": True,
    "n": 8,
    "temperature": 1.0,  # several greedy answers would be one
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
    with ThreadPoolExecutor(LIMIT) as pool:
        working = [pool.submit(fleet.post, CHAT, LONG) for _ in range(LIMIT)]
        eventually(
            "the router is full", lambda: fleet.get("/v1/fleet")["requests_in_work"] == LIMIT
        )
        refused = fleet.post(CHAT, LONG)
        others = {
            path: httpx.get(fleet.url + path, timeout=5.0).status_code
            for path in ("/health", "/metrics", "/v1/fleet", "/v1/goals", "/v1/models")
        }
        assert not any(request.done() for request in working)
    assert {request.result().status_code for request in working} == {200}
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
    threading.Event().wait(1.0)
    busy = [
        e.pid for e, was in zip(engines, before, strict=True) if sum(e.cpu_times()[:2]) - was > 0.1
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
    (attempt,) = outcome.failed_attempts
    assert attempt.slm_id == SLM
    # vLLM may answer with an error of its own before it knows that its engine is dead.
    assert attempt.failure in ("engine_died", "server_error", "transport")
    assert (outcome.status, outcome.failure) == ("ok", "")
