"""The router and sleeping SLMs: requests are queued, kept alive, refused in time, not lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calm_serve.config import ResidencyOptions
from calm_serve.protocol.topics import DesiredResidency
from calm_serve.testing import make_facts, make_replica
from calm_serve.types import Residency
from calm_serve.upstreams import Failure, FailureKind, UpstreamError
from deployments.router import (
    deployment,
    dispatch,
    fleet_view,
    wakeup_queue,
)
from deployments.router.live_state import LiveView
from deployments.wire import ReplyEnd, deployment_name
from tests.router_harness import Knowledge, Metrics, Service

CHAT = {"model": "small", "messages": [{"role": "user", "content": "good morning"}]}
END = ReplyEnd(b"data: [DONE]\n\n", make_facts("r1"))
BUDGET = ResidencyOptions(memory_budget_bytes=1, hold_s=20.0)
ASLEEP = {"small": "asleep", "large": "hot"}


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> LiveView:
    view = LiveView(lambda: 0.0)
    for module in (dispatch, fleet_view, wakeup_queue):
        monkeypatch.setattr(module, "VIEW", view)
    for slm_id in ("small", "large"):
        view.update_replicas(deployment_name(slm_id), [make_replica("r1")])
    replica = SimpleNamespace(replica_id=SimpleNamespace(unique_id="router-1"))
    monkeypatch.setattr(deployment.serve, "get_replica_context", lambda: replica)
    monkeypatch.setattr(deployment, "KnowledgeClient", Knowledge)
    monkeypatch.setattr(deployment, "RouterMetrics", Metrics)
    monkeypatch.setattr(deployment, "REFRESH_S", 0.0)
    monkeypatch.setattr(wakeup_queue, "KEEPALIVE_AFTER_S", 0.001)
    monkeypatch.setattr(wakeup_queue, "KEEPALIVE_PERIOD_S", 0.001)
    return view


def asleep(folder: Path, *items: Any) -> Service:
    return Service(folder, *items)


def desire(service: Service, tiers: dict[str, str]) -> None:
    desired = {slm_id: Residency(tier) for slm_id, tier in tiers.items()}
    service.router._view.set_desired_residency(DesiredResidency(desired, BUDGET), 1)


def stream_of(response: Any) -> AsyncIterator[bytes]:
    stream: AsyncIterator[bytes] = response.body_iterator
    return stream


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_stream_gets_comments_until_its_slm_is_awake(
    view: LiveView, tmp_path: Path
) -> None:
    async with asleep(tmp_path, b"data: 1\n\n", END) as service:
        desire(service, ASLEEP)
        response: Any = await service.post({**CHAT, "stream": True})
        stream = stream_of(response)
        assert [await anext(stream) for _ in range(3)] == [wakeup_queue.KEEPALIVE] * 3
        desire(service, {"small": "hot"})
        rest = [part async for part in stream if part != wakeup_queue.KEEPALIVE]
        (outcome,) = await service.outcomes()
    assert rest == [b"data: 1\n\n", END.payload]
    assert response.headers["x-calm-model"] == "small"
    assert (outcome.status, outcome.http_status, outcome.timing.cold) == ("ok", 200, True)
    assert outcome.decision.preferred_hot is False


async def test_an_answer_in_one_piece_waits(view: LiveView, tmp_path: Path) -> None:
    async with asleep(tmp_path, ReplyEnd(b"{}", make_facts("r1"))) as service:
        desire(service, ASLEEP)
        waiting = asyncio.create_task(service.post(CHAT))
        await turns()
        assert not waiting.done()
        desire(service, {"small": "hot"})
        response = await waiting
        (outcome,) = await service.outcomes()
    assert (response.status_code, bytes(response.body)) == (200, b"{}")
    assert outcome.timing.cold


@pytest.mark.parametrize(
    "items",
    [
        (UpstreamError(Failure(FailureKind.TRANSPORT, "connection reset")),),
        (UpstreamError(Failure(FailureKind.INVALID_REQUEST, "no such parameter")),),
    ],
    ids=["dead", "refused"],
)
async def test_what_fails_after_comments_is_an_error_event(
    view: LiveView, tmp_path: Path, items: Any
) -> None:
    async with asleep(tmp_path, *items) as service:
        desire(service, ASLEEP)
        response: Any = await service.post({**CHAT, "stream": True})
        stream = stream_of(response)
        assert await anext(stream) == wakeup_queue.KEEPALIVE
        desire(service, {"small": "hot"})
        last = [part async for part in stream][-1]
        (outcome,) = await service.outcomes()
    assert last.startswith(b'data: {"error"')
    assert last.endswith(b"}\n\n")
    assert outcome.status in ("error", "rejected")


async def test_a_client_that_leaves_leaves_the_queue(view: LiveView, tmp_path: Path) -> None:
    async with asleep(tmp_path, b"data: 1\n\n", END) as service:
        desire(service, ASLEEP)
        response: Any = await service.post({**CHAT, "stream": True})
        stream: Any = stream_of(response)
        assert await anext(stream) == wakeup_queue.KEEPALIVE
        await stream.aclose()
        await turns()
        assert not service.router._wakeup_queue._queued
        (outcome,) = await service.outcomes()
    assert (outcome.status, outcome.http_status) == ("cancelled", 499)


async def test_a_stream_that_is_never_read_leaves_the_queue(view: LiveView, tmp_path: Path) -> None:
    async with asleep(tmp_path, b"data: 1\n\n", END) as service:
        desire(service, ASLEEP)
        response: Any = await service.post({**CHAT, "stream": True})
        del response
        await turns()
        assert not service.router._wakeup_queue._queued
        (outcome,) = await service.outcomes()
    assert outcome.status == "cancelled"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_wait_that_is_too_long_is_refused_with_retry_after(
    view: LiveView, tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Knowledge, "waits", {"small": 41.5})
    async with asleep(tmp_path, END) as service:
        desire(service, ASLEEP)
        await turns()
        response = await service.post({**CHAT, "stream": stream})
        (outcome,) = await service.outcomes()
    assert (response.status_code, response.headers["retry-after"]) == (503, "42")
    assert b"model_asleep" in bytes(response.body)
    # No failure of the SLM: its breaker stays closed.
    assert (outcome.status, outcome.http_status) == ("rejected", 503)


async def test_a_hot_slm_streams_without_comments(view: LiveView, tmp_path: Path) -> None:
    async with asleep(tmp_path, b"data: 1\n\n", END) as service:
        desire(service, ASLEEP)
        response: Any = await service.post({**CHAT, "model": "large", "stream": True})
        parts = [part async for part in stream_of(response)]
        (outcome,) = await service.outcomes()
    assert parts == [b"data: 1\n\n", END.payload]
    assert (outcome.timing.cold, outcome.decision.preferred_hot) == (False, True)


async def test_the_budget_is_shown_and_changed_at_run_time(view: LiveView, tmp_path: Path) -> None:
    async with asleep(tmp_path, END) as service:
        desire(service, ASLEEP)
        shown = await service.request("GET", "/v1/residency")
        body = json.dumps({"memory_budget_bytes": "2GiB", "policy": "lru"}).encode()
        changed = await service.request("PUT", "/v1/residency", body)
        wrong = await service.request("PUT", "/v1/residency", b'{"memory_budget": 1}')
        small = await service.request("PUT", "/v1/residency", b'{"memory_budget_bytes": 1}')
        options = service.router._knowledge.residency
    assert json.loads(bytes(shown.body))["tiers"] == ASLEEP
    assert changed.status_code == 200
    assert (options.memory_budget_bytes, options.policy) == (2 << 30, "lru")
    assert (wrong.status_code, small.status_code) == (400, 400)
    assert b"nearest valid key" in bytes(wrong.body)
    assert b"exceed" in bytes(small.body)
