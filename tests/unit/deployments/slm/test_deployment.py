"""A replica reports a dead engine to the knowledge actor, and to the router of each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from calm_serve.errors import ComponentError, RequestError
from calm_serve.testing import make_spec
from deployments.slm import deployment
from deployments.slm.deployment import SLM
from deployments.slm.sleep import ReplicaResidency
from deployments.wire import ErrorReply


class EngineDead(Exception):
    """vLLM's EngineDeadError."""


class Engine:
    """An engine whose answers fail with `failure`."""

    def __init__(self) -> None:
        self.dead = False
        self.failure: Exception = EngineDead("killed")

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDead("killed")

    async def chat(self, _body: Any, _facts: Any) -> AsyncIterator[bytes]:
        raise self.failure
        yield b""

    async def sleep(self) -> None:
        """Not used here."""

    async def wake(self) -> None:
        """Not used here."""

    def shutdown(self) -> None:
        """Nothing to stop."""


class Replica:
    """An SLM without Ray and vLLM, and what it reported."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.reports: list[tuple[str, str]] = []
        self.slm: Any = SLM.__new__(SLM)
        self.slm.__dict__ |= {
            "_spec": make_spec("small"),
            "_replica_id": "r1",
            "_calls": iter(range(9)),
            "_engine": self.engine,
            "_residency": ReplicaResidency(self.engine, self._report),
            "_dead_error": EngineDead,
            "_facts_type": lambda keep_text: SimpleNamespace(output_tokens=0),
            "_error_body": lambda error: error.message.encode(),
            "_energy": SimpleNamespace(
                start=lambda _key: None,
                add_tokens=lambda _key, _tokens: None,
                finish=lambda _key: None,
            ),
        }

    def _report(self, state: str, _times: Mapping[str, float], detail: str) -> None:
        self.reports.append((state, detail))

    async def chat(self) -> ErrorReply:
        (reply,) = [item async for item in self.slm.chat({"messages": []}, {})]
        assert isinstance(reply, ErrorReply)
        return reply


async def test_a_dead_engine_is_named_in_the_reply_and_reported_once() -> None:
    replica = Replica()
    replica.engine.dead = True
    for _ in range(2):  # the second one does not reach the engine
        reply = await replica.chat()
        assert (reply.http_status, reply.dead_replica) == (503, "r1")
    assert replica.reports == [("failed", "died: killed")]
    with pytest.raises(ComponentError):
        await replica.slm.check_health()


async def test_the_death_is_named_even_when_vllm_raises_another_error() -> None:
    replica = Replica()
    replica.engine.dead, replica.engine.failure = True, ComponentError("issue")
    assert (await replica.chat()).dead_replica == "r1"


@pytest.mark.parametrize("failure", [RequestError("too long"), ComponentError("no memory")])
async def test_an_error_of_a_live_engine_reports_no_death(failure: Exception) -> None:
    replica = Replica()
    replica.engine.failure = failure
    assert (await replica.chat()).dead_replica == ""
    assert replica.reports == []
    await replica.slm.check_health()


async def test_a_dead_engine_is_reported_without_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deployment, "ENGINE_CHECK_S", 0.0)
    replica = Replica()
    checks = asyncio.create_task(replica.slm._check_engine_until_dead())
    await asyncio.sleep(0)
    assert not checks.done()
    replica.engine.dead = True
    await checks
    assert replica.reports == [("failed", "died: killed")]
