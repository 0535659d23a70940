"""Goals outlive restarts; a changed configuration wins; every change is on record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from calm_serve.config import Goals
from calm_serve.knowledge.goal_history import CONFIGURATION, MAX_LABEL_CHARS
from calm_serve.knowledge.service import KnowledgeService
from calm_serve.knowledge.store import MAX_GOAL_CHANGES, OutcomeStore
from calm_serve.protocol.topics import FORMATS, GOAL_CHANGES, GoalChange, Topic, decode
from tests.knowledge_world import World, published, revisions

CONFIGURED = Goals(ttft_p95_s=1.0)
CHANGED = Goals(ttft_p95_s=2.0, min_quality=0.5)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


async def newest(service: KnowledgeService) -> GoalChange | None:
    found: GoalChange | None = await published(service, Topic.GOALS)
    return found


async def changed(service: KnowledgeService, goals: Goals, by: str) -> GoalChange:
    """Change the goals; return what the caller is answered."""
    found: GoalChange = FORMATS[Topic.GOALS].decode(await service.set_goals(goals, by))
    return found


async def test_nothing_is_published_before_a_deployment_states_its_goals(world: World) -> None:
    assert await newest(world.start()) is None


async def test_the_goals_of_a_deployment_are_published(world: World) -> None:
    service = world.start()
    await service.configure_goals(CONFIGURED)
    found = await newest(service)
    assert found is not None
    assert Goals.model_validate(found.new) == CONFIGURED
    assert (found.by, found.old) == (CONFIGURATION, None)


async def test_a_change_is_published_durable_and_signed(world: World) -> None:
    service = world.start()
    await service.configure_goals(CONFIGURED)
    seen = await revisions(service)
    change = await changed(service, CHANGED, "ann")
    assert (change.at, change.by) == (world.clock.now, "ann")
    assert change.old == {"ttft_p95_s": 1.0}
    assert change.new == {"ttft_p95_s": 2.0, "min_quality": 0.5}
    update = (await service.follow(seen, 5.0))[Topic.GOALS]
    assert decode(Topic.GOALS, update) == change
    again = world.start()  # the first one is not closed, as after a kill
    found = await newest(again)
    assert found is not None
    assert Goals.model_validate(found.new) == CHANGED


async def test_a_change_outlives_a_redeployment_with_the_same_configuration(world: World) -> None:
    await world.start().configure_goals(CONFIGURED)
    await changed(world.services[0], CHANGED, "ann")
    again = world.start()
    await again.configure_goals(CONFIGURED)
    found = await newest(again)
    assert found is not None
    assert (found.by, found.new["ttft_p95_s"]) == ("ann", 2.0)


async def test_an_edited_configuration_wins_over_an_older_change(world: World) -> None:
    service = world.start()
    await service.configure_goals(CONFIGURED)
    await changed(service, CHANGED, "ann")
    await service.configure_goals(Goals(ttft_p95_s=3.0))
    found = await newest(service)
    assert found is not None
    assert (found.by, found.new) == (CONFIGURATION, {"ttft_p95_s": 3.0})
    history = GOAL_CHANGES.decode(await service.goal_changes(10))
    assert [(h.by, h.new["ttft_p95_s"]) for h in history] == [
        (CONFIGURATION, 3.0),
        ("ann", 2.0),
        (CONFIGURATION, 1.0),
    ]
    assert GOAL_CHANGES.decode(await service.goal_changes(1)) == history[:1]


async def test_a_policy_change_is_a_change_of_goals(world: World) -> None:
    service = world.start()
    await service.configure_goals(CONFIGURED)
    change = await changed(service, Goals.model_validate({"policy": {"name": "random"}}), "ann")
    assert change.new == {"policy": {"name": "random"}}


async def test_changes_at_once_leave_the_last_written_one_published(world: World) -> None:
    service = world.start()
    await service.configure_goals(CONFIGURED)
    changes = await asyncio.gather(
        *(changed(service, Goals(ttft_p95_s=float(n)), "ann") for n in range(1, 9))
    )
    found = await newest(service)
    assert found is not None
    assert found.revision == max(c.revision for c in changes)


async def test_a_label_is_cut_and_printable(world: World) -> None:
    change = await changed(world.start(), CHANGED, "a\nb" + "x" * 200)
    assert change.by == ("a?b" + "x" * 200)[:MAX_LABEL_CHARS]


async def test_stored_goals_of_another_version_give_way_to_the_configuration(
    world: World, tmp_path: Path
) -> None:
    await world.start().configure_goals(CONFIGURED)
    store = OutcomeStore(f"sqlite:///{tmp_path / 'state' / 'outcomes.sqlite'}")
    store.add_goal_change(GoalChange(1.0, "old", None, {"gone_field": 1}), None)
    store.close()
    again = world.start()
    assert await newest(again) is None
    await again.configure_goals(CONFIGURED)
    found = await newest(again)
    assert found is not None
    assert found.new == {"ttft_p95_s": 1.0}


def test_the_audit_trail_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_GOAL_CHANGES >= 1000
    monkeypatch.setattr("calm_serve.knowledge.store.MAX_GOAL_CHANGES", 3)
    store = OutcomeStore(f"sqlite:///{tmp_path / 'log.sqlite'}")
    for number in range(5):
        store.add_goal_change(GoalChange(float(number), "ann", None, {}), None)
    assert [c.at for c in store.goal_changes(10)] == [4.0, 3.0, 2.0]
    store.close()
