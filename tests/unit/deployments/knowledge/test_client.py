"""The router's calls to the knowledge actor: what crosses, what an error means, following."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from calm_serve.config import Goals, Learning
from calm_serve.errors import KnowledgeError, RequestError
from calm_serve.protocol.outcomes import OUTCOME, SIGNALS, decode_batch
from calm_serve.protocol.reports import DEMAND_REPLY, DEMAND_REPORT, DemandReply, DemandReport
from calm_serve.protocol.topics import FORMATS, GOAL_CHANGES, GoalChange, Topic, Update
from calm_serve.testing import make_fleet, make_outcome
from calm_serve.types import QualitySignal
from deployments.knowledge import client as client_module
from deployments.knowledge.client import KnowledgeClient

FLEET = make_fleet()


def raising(error: Exception) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def call(*_: Any) -> Any:
        raise error

    return call


class Actor:
    """Answers calls with scripted replies, and keeps them; an exception is raised."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.calls: list[tuple[Any, ...]] = []

    async def call(self, *call: Any) -> Any:
        # `follow` passes a dictionary that it goes on changing.
        self.calls.append(tuple(dict(a) if isinstance(a, dict) else a for a in call))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


@pytest.fixture
def client() -> KnowledgeClient:
    return KnowledgeClient("calm", Learning(), FLEET)


def connect(client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch, *replies: Any) -> Actor:
    actor = Actor(*replies)
    monkeypatch.setattr(client, "_call", actor.call)
    return actor


async def test_what_the_actor_refuses_is_the_clients_mistake(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RayTaskError("change_predictor", "traceback", RequestError("no such", param="version"))
    monkeypatch.setattr(client, "_call", raising(error.as_instanceof_cause()))
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


async def test_outcomes_cross_as_a_batch_with_an_id_of_its_own(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = connect(client, monkeypatch, ["a", "b"], ["a", "b"])
    rows = [make_outcome("a"), make_outcome("b")]
    await client.log(rows)
    await client.log(rows)
    (method, batch_id, batch), (_, another_id, _) = actor.calls
    assert (method, decode_batch(batch)) == ("log", (rows, {}))
    assert batch_id != another_id


async def test_a_stored_outcome_is_read_by_its_format(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = make_outcome("a", signals=(QualitySignal("feedback", 1.0, 5.0),))
    actor = connect(client, monkeypatch, OUTCOME.encode(outcome), None)
    assert await client.outcome("a") == outcome
    assert await client.outcome("b") is None
    assert actor.calls == [("outcome", "a"), ("outcome", "b")]


async def test_demand_is_reported_and_answered_by_format(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply, report = DemandReply({"small": 0.5}), DemandReport(("small",), queued={"small": 1})
    actor = connect(client, monkeypatch, DEMAND_REPLY.encode(reply))
    assert await client.report_demand("router-1", report) == reply
    ((method, router_id, sent),) = actor.calls
    assert (method, router_id, DEMAND_REPORT.decode(sent)) == ("report_demand", "router-1", report)


async def test_a_change_of_goals_is_answered_with_the_durable_change(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = GoalChange(1.0, "ann", None, {"ttft_p95_s": 2.0}, revision=7)
    actor = connect(client, monkeypatch, FORMATS[Topic.GOALS].encode(change))
    assert await client.set_goals(Goals(ttft_p95_s=2.0), "ann") == change
    assert actor.calls == [("set_goals", Goals(ttft_p95_s=2.0), "ann")]


async def test_quality_signals_and_the_goals_history_cross_by_format(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = (QualitySignal("feedback", 1.0, 5.0), QualitySignal("validator:json", 0.0))
    changes = (GoalChange(2.0, "ann", {}, {"ttft_p95_s": 2.0}, 2), GoalChange(1.0, "x", None, {}))
    actor = connect(client, monkeypatch, True, GOAL_CHANGES.encode(changes))
    await client.feedback("a", signals)
    assert await client.goal_changes(5) == changes
    (method, outcome_id, sent), asked = actor.calls
    assert (method, outcome_id, SIGNALS.decode(sent)) == ("add_signals", "a", signals)
    assert asked == ("goal_changes", 5)


async def test_an_actor_without_the_method_is_of_an_older_program(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_actor", object())
    with pytest.raises(KnowledgeError, match="runs an older program; remove it and deploy again"):
        await client.feedback("a", (QualitySignal("feedback", 1.0),))


async def test_following_passes_updates_on_and_survives_an_actor_that_is_away(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", 0.0)
    slms, goals = Update(5, b"slms"), Update(6, b"goals")
    applied: list[tuple[str, Update, bool]] = []

    async def apply(topic: str, update: Update) -> None:
        applied.append((topic, update, client.reachable))

    actor = connect(
        client, monkeypatch, {"slms": slms}, RayActorError(), {"goals": goals}, KeyError("the end")
    )
    assert not client.reachable
    with pytest.raises(KeyError):
        async with asyncio.timeout(10.0):
            await client.follow(apply)
    assert applied == [("slms", slms, True), ("goals", goals, True)]
    seen = [call[1] for call in actor.calls]
    assert seen == [{}, {"slms": 5}, {"slms": 5}, {"slms": 5, "goals": 6}]


async def test_an_actor_that_does_not_answer_is_not_reachable(
    client: KnowledgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.reachable = True

    async def apply(topic: str, update: Update) -> None:
        raise AssertionError((topic, update))

    connect(client, monkeypatch, RayActorError())
    following = asyncio.create_task(client.follow(apply))
    async with asyncio.timeout(10.0):
        while client.reachable:  # noqa: ASYNC110  # no event announces it
            await asyncio.sleep(0)
    following.cancel()
