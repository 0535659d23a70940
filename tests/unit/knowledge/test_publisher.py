"""What the knowledge actor tells everybody: the board, later SLMs, start-up states."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from calm_serve.errors import ConfigError
from calm_serve.knowledge.publisher import Publisher
from calm_serve.knowledge.slm_registry import (
    EXPIRY_S,
    MAX_REPLICAS_PER_SLM,
    MAX_SLMS,
    StartupStates,
)
from tests.knowledge_data import CODER, make_spec
from tests.knowledge_world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


async def test_the_board_answers_at_once_what_is_new_and_only_that(world: World) -> None:
    service = world.start()
    first = await service.board({}, 5.0)
    assert set(first) == {"registry", "states", "challenger", "models"}
    have = {k: e["version"] for k, e in first.items()}
    await service.report_state(CODER, "r1", "loading", {"import": 1.5}, "weights")
    second = await service.board(have, 5.0)
    assert set(second) == {"states"}
    report = second["states"]["value"][CODER]["r1"]
    assert (report["state"], report["ready_s"]) == ("loading", {"import": 1.5})


async def test_a_waiting_reader_is_woken_by_news(world: World) -> None:
    service = world.start()
    have = {k: e["version"] for k, e in (await service.board({}, 0.0)).items()}
    waiting = asyncio.create_task(service.board(have, 60.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await service.report_state(CODER, "r1", "ready", {}, "")
    assert set(await waiting) == {"states"}


async def test_a_long_poll_without_news_ends_empty() -> None:
    board = Publisher(7)
    board.publish("a", 1)
    assert await board.wait({"a": 7}, 0.001) == {}


async def test_a_reader_of_some_keys_is_left_alone_by_the_others() -> None:
    board = Publisher(7)
    reading = asyncio.create_task(board.wait({}, 60.0, ["b"]))
    for key in ("a", "a", "b"):
        assert not reading.done()
        board.publish(key, 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert set(await reading) == {"b"}


async def test_a_reader_of_a_service_that_restarted_reads_everything_again(world: World) -> None:
    have = {k: e["version"] for k, e in (await world.start().board({}, 0.0)).items()}
    assert set(await world.start().board(have, 0.0)) == {
        "registry",
        "states",
        "challenger",
        "models",
    }


async def test_a_registered_slm_is_on_the_board_until_its_heartbeat_stops(world: World) -> None:
    service, spec = world.start(), make_spec("later")
    await service.register(spec.model_dump_json(), "app2")
    entry = (await service.board({}, 0.0))["registry"]
    assert entry["value"]["later"]["app_name"] == "app2"
    world.clock.now += EXPIRY_S - 1
    await service.register(spec.model_dump_json(), "app2")  # a heartbeat is no news
    assert (await service.board({}, 0.0))["registry"]["version"] == entry["version"]
    world.clock.now += EXPIRY_S - 1
    await service.tick()
    assert (await service.status())["registered"] == ["later"]
    world.clock.now += 2
    await service.tick()
    assert (await service.board({}, 0.0))["registry"]["value"] == {}


async def test_registrations_survive_a_kill_and_still_expire(world: World) -> None:
    await world.start().register(make_spec("later").model_dump_json(), "app2")
    again = world.start()
    assert set((await again.board({}, 0.0))["registry"]["value"]) == {"later"}
    world.clock.now += EXPIRY_S + 1
    await again.tick()
    assert (await again.board({}, 0.0))["registry"]["value"] == {}


async def test_an_unregistered_slm_leaves_the_board(world: World) -> None:
    service = world.start()
    await service.register(make_spec("later").model_dump_json(), "app2")
    await service.unregister("later")
    await service.unregister("never there")
    assert (await service.board({}, 0.0))["registry"]["value"] == {}


async def test_a_taken_id_or_a_bad_spec_is_not_registered(world: World) -> None:
    service = world.start()
    with pytest.raises(ConfigError, match="taken"):
        await service.register(make_spec(CODER).model_dump_json(), "app2")
    await service.register(make_spec("later").model_dump_json(), "app2")
    with pytest.raises(ConfigError, match="taken"):
        await service.register(make_spec("later").model_dump_json(), "app3")
    with pytest.raises(ConfigError, match="registered SLM"):
        await service.register('{"id": "x"}', "app2")


def test_startup_reports_are_bounded_and_keep_the_newest() -> None:
    states = StartupStates()
    for i in range(MAX_REPLICAS_PER_SLM + 1):
        states.report("a", f"r{i}", {"state": "ready"})
    assert len(states.snapshot()["a"]) == MAX_REPLICAS_PER_SLM
    assert "r0" not in states.snapshot()["a"]
    for i in range(MAX_SLMS):
        states.report(f"s{i}", "r", {})
    assert len(states.snapshot()) == MAX_SLMS
    assert "a" not in states.snapshot()
