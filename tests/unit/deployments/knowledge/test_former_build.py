"""Calls between a knowledge actor and callers of another build of the program."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from calm_serve.config import Goals, Learning
from calm_serve.protocol.topics import REGISTRATION
from calm_serve.testing import make_fleet, make_outcome, make_spec
from calm_serve.types import QualitySignal
from deployments.knowledge import actor as actor_module
from deployments.knowledge import registration as registration_module
from deployments.knowledge.actor import KnowledgeActor
from deployments.knowledge.registration import Registration
from tests.knowledge_world import log


@pytest.fixture
async def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KnowledgeActor]:
    context = SimpleNamespace(was_current_actor_reconstructed=False)
    monkeypatch.setattr(actor_module.ray, "get_runtime_context", lambda: context)
    made = KnowledgeActor(make_fleet(), Learning(state_dir=str(tmp_path)))
    yield made
    await made.close()


async def test_an_slm_application_of_the_former_build_is_registered(actor: KnowledgeActor) -> None:
    await actor.register(make_spec("later").model_dump_json(), "app2")
    assert (await actor.status())["registered"] == ["later"]


async def test_a_router_of_the_former_build_gives_feedback_and_reads_the_goals_history(
    actor: KnowledgeActor,
) -> None:
    await log(actor, "b", [make_outcome("a")])
    assert await actor.feedback("a", [asdict(QualitySignal("feedback", 1.0, 5.0))]) is True
    await actor.set_goals(Goals(ttft_p95_s=2.0), "ann")
    (change,) = await actor.goal_history(10)
    assert (change["by"], change["new"]) == ("ann", {"ttft_p95_s": 2.0})


class Method:
    """A remote method that keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    async def remote(self, *args: object) -> None:
        self.calls.append(args)


class Heartbeats(Registration):
    """A registration outside Serve, which would await its constructor and destructor."""

    def __del__(self) -> None:  # type: ignore[override]
        """Unregister nothing."""


def make_registration() -> Registration:
    made = object.__new__(Heartbeats)
    made._spec, made._knowledge, made._own_app = make_spec("later"), "knowledge-calm", "app2"
    return made


async def test_a_heartbeat_crosses_as_a_versioned_record(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method()
    actor = SimpleNamespace(register_slm=method)
    monkeypatch.setattr(registration_module.ray, "get_actor", lambda *_, **__: actor)
    await make_registration()._register()
    ((sent,),) = method.calls
    assert isinstance(sent, bytes)
    found = REGISTRATION.decode(sent)
    assert (found.spec["id"], found.app_name) == ("later", "app2")


async def test_an_actor_of_the_former_build_is_named_and_heartbeats_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        registration_module.ray, "get_actor", lambda *_, **__: SimpleNamespace(register=Method())
    )
    with caplog.at_level(logging.ERROR):
        await make_registration()._register()
    assert "'later' is not registered: the knowledge actor runs an older program" in caplog.text
