"""A replica follows the published desired residency, also across a restart of the actor."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from calm_serve.knowledge.publisher import Publisher
from calm_serve.protocol.topics import DesiredResidency, Topic
from calm_serve.types import Residency
from deployments.slm import sleep


class World:
    """A publisher behind an actor that may be away, and what the replica of SLM "sql" received."""

    def __init__(self) -> None:
        self.publisher = Publisher(1)
        self.away = asyncio.Event()
        self.polls = 0
        self.received: list[str] = []

    def get_actor(self, name: str, namespace: str) -> Any:
        assert (name, namespace) == ("knowledge-calm", "calm_serve")
        return SimpleNamespace(follow=SimpleNamespace(remote=self._follow))

    async def _follow(self, seen: dict[str, int], timeout_s: float, topics: list[str]) -> Any:
        self.polls += 1
        if self.away.is_set():
            raise RayActorError
        return await self.publisher.wait(seen, timeout_s, topics)

    def set_desired(self, residency: str, revision: int) -> None:
        assert revision >= 1
        self.received.append(residency)

    def report_again(self) -> None:
        self.received.append("report again")

    async def publish(self, topic: Topic, record: Any) -> None:
        self.publisher.publish(topic, record)
        for _ in range(20):
            await asyncio.sleep(0)


def desired(**tiers: str) -> DesiredResidency:
    return DesiredResidency({i: Residency(tier) for i, tier in tiers.items()})


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    world: Any = World()
    monkeypatch.setattr(sleep.ray, "get_actor", world.get_actor)
    monkeypatch.setattr(sleep, "POLL_RETRY_S", 0.0)
    following = asyncio.create_task(sleep.follow_desired_residency("calm", "sql", world))
    await asyncio.sleep(0)
    yield world
    following.cancel()


async def test_desired_residency_arrives_in_turn_and_is_hot_by_default(world: World) -> None:
    await world.publish(Topic.RESIDENCY, desired(sql="asleep", shell="hot"))
    await world.publish(Topic.RESIDENCY, desired(sql="hot"))
    await world.publish(Topic.RESIDENCY, desired())
    assert world.received == ["asleep", "hot", "hot"]


async def test_other_topics_do_not_end_a_replicas_poll(world: World) -> None:
    polls = world.polls
    for _ in range(3):
        await world.publish(Topic.REPLICAS, {})
    assert (world.polls, world.received) == (polls, [])


async def test_an_unreachable_actor_changes_nothing_until_it_is_back(world: World) -> None:
    await world.publish(Topic.RESIDENCY, desired(sql="asleep"))
    world.away.set()
    await world.publish(Topic.RESIDENCY, desired(sql="asleep"))
    polls = world.polls
    await world.publish(Topic.RESIDENCY, desired(sql="hot"))
    assert world.polls > polls  # it keeps polling
    assert world.received == ["asleep", "asleep"]
    world.away.clear()
    await world.publish(Topic.REPLICAS, {})
    assert world.received[-1] == "hot"


async def test_the_state_is_reported_again_to_a_restarted_actor(world: World) -> None:
    await world.publish(Topic.SLMS, {})
    world.away.set()
    await world.publish(Topic.RESIDENCY, desired(sql="asleep"))
    world.publisher = Publisher(1000)
    await world.publish(Topic.SLMS, {})
    assert world.received == ["report again", "asleep"]
    world.away.clear()
    await world.publish(Topic.REPLICAS, {})
    assert world.received == ["report again", "asleep", "report again"]
