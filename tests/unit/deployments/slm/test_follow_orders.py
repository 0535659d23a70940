"""A replica follows the board's orders, and does without the knowledge actor for a while."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from calm_serve.knowledge.publisher import Publisher
from deployments.slm import sleep


class World:
    """A board behind an actor that may be away, and what the tier of SLM "sql" heard."""

    def __init__(self) -> None:
        self.board = Publisher(1)
        self.away = asyncio.Event()
        self.asked = 0
        self.heard: list[str] = []

    def get_actor(self, name: str, namespace: str) -> Any:
        assert (name, namespace) == ("knowledge-calm", "calm_serve")
        return SimpleNamespace(board=SimpleNamespace(remote=self._board))

    async def _board(self, have: dict[str, int], timeout_s: float, keys: list[str]) -> Any:
        self.asked += 1
        if self.away.is_set():
            raise RayActorError
        return await self.board.wait(have, timeout_s, keys)

    def order(self, tier: str, version: int) -> None:
        assert version >= 1
        self.heard.append(tier)

    def repeat(self) -> None:
        self.heard.append("say it again")

    async def publish(self, key: str, value: Any) -> None:
        self.board.publish(key, value)
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    world: Any = World()
    monkeypatch.setattr(sleep.ray, "get_actor", world.get_actor)
    monkeypatch.setattr(sleep, "POLL_RETRY_S", 0.0)
    following = asyncio.create_task(sleep.follow_orders("calm", "sql", world))
    await asyncio.sleep(0)
    yield world
    following.cancel()


async def test_orders_arrive_in_turn_and_no_word_means_hot(world: World) -> None:
    await world.publish("residency", {"tiers": {"sql": "asleep", "shell": "hot"}})
    await world.publish("residency", {"tiers": {"sql": "hot"}})
    await world.publish("residency", {"tiers": {}})
    assert world.heard == ["asleep", "hot", "hot"]


async def test_what_is_not_for_replicas_does_not_wake_them(world: World) -> None:
    asked = world.asked
    for _ in range(3):
        await world.publish("states", {})
    assert (world.asked, world.heard) == (asked, [])


async def test_an_actor_that_is_away_changes_nothing_until_it_is_back(world: World) -> None:
    await world.publish("residency", {"tiers": {"sql": "asleep"}})
    world.away.set()
    await world.publish("residency", {"tiers": {"sql": "asleep"}})
    asked = world.asked
    await world.publish("residency", {"tiers": {"sql": "hot"}})
    assert world.asked > asked  # it keeps asking
    assert world.heard == ["asleep", "asleep"]
    world.away.clear()
    await world.publish("states", {})
    assert world.heard[-1] == "hot"


async def test_a_restarted_actor_is_told_the_state_again(world: World) -> None:
    await world.publish("registry", {})
    world.away.set()
    await world.publish("residency", {"tiers": {"sql": "asleep"}})
    world.board = Publisher(1000)
    await world.publish("registry", {})
    assert world.heard == ["say it again", "asleep"]
    world.away.clear()
    await world.publish("states", {})
    assert world.heard == ["say it again", "asleep", "say it again"]
