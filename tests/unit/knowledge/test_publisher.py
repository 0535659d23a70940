"""What the knowledge actor publishes: topics, SLMs that join later, start-up states."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from calm_serve.config import SLMSpec
from calm_serve.errors import ConfigError, KnowledgeError
from calm_serve.knowledge.publisher import Publisher
from calm_serve.knowledge.service import MAX_DETAIL_CHARS
from calm_serve.knowledge.slm_registry import (
    EXPIRY_S,
    MAX_REPLICAS_PER_SLM,
    MAX_SLMS,
    StartupStates,
)
from calm_serve.protocol.reports import REPLICA_REPORT, ReplicaReport
from calm_serve.protocol.topics import REGISTRATION, RegisteredSLM, Topic, decode
from tests.knowledge_data import CODER, make_spec
from tests.knowledge_world import World, published, register, revisions

AT_THE_START = {"slms", "replicas", "challenger", "predictors"}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


async def test_a_follower_gets_at_once_what_is_new_and_only_that(world: World) -> None:
    service = world.start()
    first = await service.follow({}, 5.0)
    assert set(first) == AT_THE_START
    seen = {topic: update.revision for topic, update in first.items()}
    report = ReplicaReport("loading", {"import": 1.5}, "weights")
    await service.report_state(CODER, "r1", REPLICA_REPORT.encode(report))
    second = await service.follow(seen, 5.0)
    assert set(second) == {"replicas"}
    found = decode("replicas", second["replicas"])
    assert found == {CODER: {"r1": replace(report, at=world.clock.now)}}


async def test_the_detail_of_a_report_is_cut(world: World) -> None:
    service = world.start()
    report = ReplicaReport("failed", detail="x" * (MAX_DETAIL_CHARS + 1))
    await service.report_state(CODER, "r1", REPLICA_REPORT.encode(report))
    found = (await published(service, Topic.REPLICAS))[CODER]["r1"]
    assert len(found.detail) == MAX_DETAIL_CHARS


async def test_a_waiting_follower_is_woken_by_an_update(world: World) -> None:
    service = world.start()
    waiting = asyncio.create_task(service.follow(await revisions(service), 60.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await service.report_state(CODER, "r1", REPLICA_REPORT.encode(ReplicaReport("ready")))
    assert set(await waiting) == {"replicas"}


async def test_a_long_poll_without_updates_ends_empty() -> None:
    publisher = Publisher(7)
    publisher.publish(Topic.SLMS, {})
    assert await publisher.wait({"slms": 7}, 0.001) == {}


async def test_a_follower_of_some_topics_is_not_woken_by_the_others() -> None:
    publisher = Publisher(7)
    following = asyncio.create_task(publisher.wait({}, 60.0, ["replicas"]))
    for topic in (Topic.SLMS, Topic.SLMS, Topic.REPLICAS):
        assert not following.done()
        publisher.publish(topic, {})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert set(await following) == {"replicas"}


async def test_a_follower_of_a_service_that_restarted_reads_everything_again(world: World) -> None:
    seen = await revisions(world.start())
    assert set(await world.start().follow(seen, 0.0)) == AT_THE_START


async def test_a_registered_slm_is_published_until_its_heartbeat_stops(world: World) -> None:
    service, spec = world.start(), make_spec("later")
    await register(service, spec, "app2")
    entry = (await published(service, Topic.SLMS))["later"]
    assert (entry.app_name, SLMSpec.model_validate(entry.spec)) == ("app2", spec)
    seen = await revisions(service)
    world.clock.now += EXPIRY_S - 1
    await register(service, spec, "app2")  # a heartbeat changes nothing
    assert await revisions(service) == seen
    world.clock.now += EXPIRY_S - 1
    await service.tick()
    assert (await service.status())["registered"] == ["later"]
    world.clock.now += 2
    await service.tick()
    assert await published(service, Topic.SLMS) == {}


async def test_registrations_survive_a_kill_and_still_expire(world: World) -> None:
    await register(world.start(), make_spec("later"), "app2")
    again = world.start()
    assert set(await published(again, Topic.SLMS)) == {"later"}
    world.clock.now += EXPIRY_S + 1
    await again.tick()
    assert await published(again, Topic.SLMS) == {}


async def test_an_unregistered_slm_is_published_no_more(world: World) -> None:
    service = world.start()
    await register(service, make_spec("later"), "app2")
    await service.unregister("later")
    await service.unregister("never there")
    assert await published(service, Topic.SLMS) == {}


async def test_a_taken_id_or_a_bad_spec_is_not_registered(world: World) -> None:
    service = world.start()
    with pytest.raises(ConfigError, match="taken"):
        await register(service, make_spec(CODER), "app2")
    await register(service, make_spec("later"), "app2")
    with pytest.raises(ConfigError, match="taken"):
        await register(service, make_spec("later"), "app3")
    with pytest.raises(ConfigError, match="registered SLM"):
        await service.register_slm(REGISTRATION.encode(RegisteredSLM({"id": "x"}, "app2")))
    with pytest.raises(KnowledgeError, match="newer program"):
        await service.register_slm(b'{"format": "registration", "version": 2, "record": {}}')


def test_startup_reports_are_bounded_and_keep_the_newest() -> None:
    states = StartupStates()
    for i in range(MAX_REPLICAS_PER_SLM + 1):
        states.report("a", f"r{i}", ReplicaReport("ready"))
    assert len(states.snapshot()["a"]) == MAX_REPLICAS_PER_SLM
    assert "r0" not in states.snapshot()["a"]
    for i in range(MAX_SLMS):
        states.report(f"s{i}", "r", ReplicaReport(""))
    assert len(states.snapshot()) == MAX_SLMS
    assert "a" not in states.snapshot()
