"""The router's side of the knowledge actor: what it makes of the board and of a refusal."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
from ray.exceptions import RayTaskError

from calm_serve.config import Learning
from calm_serve.errors import KnowledgeError, RequestError
from calm_serve.learning.training import train
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import make_fleet, make_goals
from deployments.knowledge.client import KnowledgeClient
from tests.knowledge_data import CODER, TALKER, make_world

FLEET = make_fleet()


def raising(error: Exception) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def call(*_: Any) -> Any:
        raise error

    return call


@pytest.fixture
def client() -> KnowledgeClient:
    return KnowledgeClient("calm", Learning(), FLEET)


async def test_what_the_actor_refuses_is_the_clients_mistake(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = RayTaskError(
        "change_predictor", "traceback", RequestError("no such", param="version")
    )
    monkeypatch.setattr(client, "_call", raising(refusal.as_instanceof_cause()))
    with pytest.raises(RequestError, match="no such") as found:
        await client.change_predictor("pin", "v9")
    assert (found.value.http_status, found.value.param) == (400, "version")


async def test_what_broke_inside_the_actor_is_not(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = RayTaskError("predictors", "traceback", OSError("disk full"))
    monkeypatch.setattr(client, "_call", raising(broken.as_instanceof_cause()))
    with pytest.raises(KnowledgeError, match="does not answer"):
        await client.predictors()


async def test_a_challenger_on_the_board_is_asked_silently_and_decides_nothing(
    client: KnowledgeClient,
) -> None:
    training = train(
        make_world(200), (CODER, TALKER), seed=0, holdout_ratio=0.25, clock=lambda: 0.0
    )
    loop = ModelSelector(FLEET, make_goals())
    value = {
        "blob": training.artifact.to_bytes(),
        "version": training.artifact.version,
        "source": "trained",
    }
    nobody = cast(Any, None)
    await client._apply("challenger", value, loop, nobody, nobody)
    assert client.shadow.challenger is not None
    assert client.shadow.challenger.version == training.artifact.version
    assert loop.predictor.version == "prior"
    await client._apply("models", {"challenger": training.artifact.version}, loop, nobody, nobody)
    assert client.models == {"challenger": training.artifact.version}
    await client._apply("challenger", None, loop, nobody, nobody)
    assert client.shadow.challenger is None
