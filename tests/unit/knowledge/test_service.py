"""The knowledge actor logs, learns and publishes. A restart is a new object on the same folder."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from calm_serve.errors import ConfigError, KnowledgeError
from calm_serve.learning.model_registry import SHIPPED_FILE
from calm_serve.learning.training import train
from calm_serve.protocol.outcomes import OUTCOME, SIGNALS, encode_batch
from calm_serve.protocol.topics import Topic, decode
from calm_serve.types import QualitySignal
from tests.knowledge_data import CODER, TALKER, make_fleet, make_outcome, make_world
from tests.knowledge_world import World, log, published, revisions, settled


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


async def test_logged_outcomes_are_acknowledged_and_survive_a_kill(world: World) -> None:
    rows = make_world(10)
    assert await log(world.start(), "b1", rows) == [o.outcome_id for o in rows]
    again = world.start()  # the first one is not closed, as after a kill
    assert (await again.status())["outcomes"] == 10
    found = await again.outcome("o3")
    assert found is not None
    assert OUTCOME.decode(found) == rows[3]
    assert await again.outcome("unknown") is None


async def test_outcomes_may_travel_twice(world: World) -> None:
    service, rows = world.start(), make_world(5)
    await log(service, "b1", rows)
    await log(service, "b1", rows)
    assert (await service.status())["outcomes"] == 5


async def test_a_batch_of_a_newer_program_is_refused_and_nothing_of_it_is_stored(
    world: World,
) -> None:
    service = world.start()
    batch = json.loads(encode_batch(make_world(2)))
    batch["version"] += 1
    with pytest.raises(KnowledgeError, match="newer program"):
        await service.log("b1", json.dumps(batch).encode())
    assert (await service.status())["outcomes"] == 0


async def test_a_malformed_row_is_dropped_and_counted_without_losing_its_batch(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    service = world.start()
    batch = json.loads(encode_batch([make_outcome("bad"), make_outcome("good")]))
    batch["record"][0]["at"] = "yesterday"
    with caplog.at_level(logging.WARNING):
        assert set(await service.log("b9", json.dumps(batch).encode())) == {"bad", "good"}
    status = await service.status()
    assert (status["outcomes"], status["refused_rows"]) == (1, 1)
    assert "b9" in caplog.text


async def test_feedback_finds_its_outcome_in_either_order(world: World) -> None:
    service = world.start()
    signals = [{"source": "feedback", "value": 1.0, "at": 5.0}]
    assert await service.feedback("a", signals) is False
    await log(service, "b", [make_outcome("a")])
    assert await service.feedback("a", signals) is True
    assert (await service.status())["labelled"] == 1


async def test_signals_cross_as_a_versioned_record(world: World) -> None:
    service, signals = world.start(), (QualitySignal("feedback", 1.0, 5.0),)
    await log(service, "b", [make_outcome("a")])
    assert await service.add_signals("a", SIGNALS.encode(signals)) is True
    found = await service.outcome("a")
    assert found is not None
    assert OUTCOME.decode(found).signals == signals
    with pytest.raises(KnowledgeError, match="newer program"):
        await service.add_signals("a", b'{"format": "signals", "version": 2, "record": []}')
    with pytest.raises(KnowledgeError, match=r"7\.0 is not in"):
        await service.add_signals("a", SIGNALS.encode((QualitySignal("feedback", 7.0),)))


async def test_malformed_feedback_is_refused(world: World) -> None:
    with pytest.raises(KnowledgeError, match="malformed signal"):
        await world.start().feedback("a", [{"source": "feedback", "value": 7.0}])


async def test_too_few_outcomes_are_not_trained_on(world: World) -> None:
    service = world.start(min_outcomes=200)
    await log(service, "b", make_world(100))
    assert (await service.retrain())["reason"] == "too_few_outcomes"
    assert world.jobs == []


async def test_force_trains_below_the_minimum(world: World) -> None:
    service = world.start(min_outcomes=1000)
    await log(service, "b", make_world(300))
    found = await service.retrain(force=True)
    assert found["publish"] is True
    assert found["against"] == "base_rate"


async def test_training_starts_by_itself_and_is_published(world: World) -> None:
    service = world.start()
    seen = await revisions(service)
    await log(service, "b1", make_world(59))
    assert not service._learner.retraining.running
    await log(service, "b2", make_world(300)[59:])
    await settled(service)
    updates = await service.follow(seen, 5.0)
    predictor = decode(Topic.PREDICTOR, updates[Topic.PREDICTOR])
    assert predictor.source == "trained"
    assert predictor.version == (await service.status())["predictor"]
    assert world.jobs[0].slm_ids == (CODER, TALKER)


async def test_the_next_training_waits_for_enough_new_labels(world: World) -> None:
    service, rows = world.start(), make_world(340)
    await log(service, "b1", rows[:300])
    await settled(service)
    await log(service, "b2", rows[300:339])
    await settled(service)
    assert len(world.jobs) == 1
    await log(service, "b3", rows[339:])
    await settled(service)
    assert len(world.jobs) == 2
    assert world.jobs[1].champion is not None


async def test_feedback_alone_can_start_a_training(world: World) -> None:
    service = world.start()
    rows = make_world(60)
    await log(service, "b1", [make_outcome(o.outcome_id) for o in rows])
    for row in rows:
        assert world.jobs == []
        await service.feedback(row.outcome_id, row.signals)
    await settled(service)
    assert len(world.jobs) == 1


async def test_a_failed_training_is_reported_and_not_repeated_at_once(world: World) -> None:
    service = world.start()

    def fail() -> None:
        raise KnowledgeError("out of luck")

    world.before_training = fail
    await log(service, "b1", make_world(70))
    await settled(service)
    await log(service, "b2", make_world(80)[70:])
    await settled(service)
    assert len(world.jobs) == 1
    assert (await service.status())["last_verdict"]["detail"] == "out of luck"
    with pytest.raises(KnowledgeError, match="out of luck"):
        await service.retrain()


async def test_a_second_call_joins_the_training_that_runs(world: World) -> None:
    service, released = world.start(min_outcomes=1000), asyncio.Event()
    world.before_training = released.wait
    await log(service, "b", make_world(200))
    first = asyncio.create_task(service.retrain(force=True))
    second = asyncio.create_task(service.retrain(force=True))
    await world.training.wait()
    assert (await service.status())["retraining"] is True
    released.set()
    assert await first == await second
    assert len(world.jobs) == 1


async def test_a_caller_who_gives_up_does_not_end_the_training(world: World) -> None:
    service, released = world.start(min_outcomes=1000), asyncio.Event()
    world.before_training = released.wait
    await log(service, "b", make_world(300))
    caller = asyncio.create_task(service.retrain(force=True))
    await world.training.wait()
    caller.cancel()
    released.set()
    await settled(service)
    assert (await service.status())["predictor_source"] == "trained"


async def test_the_champion_survives_a_kill(world: World) -> None:
    service = world.start()
    await log(service, "b", make_world(300))
    await settled(service)
    before = await published(service, Topic.PREDICTOR)
    assert await published(world.start(), Topic.PREDICTOR) == before


async def test_a_restart_does_not_train_again_on_the_same_outcomes(world: World) -> None:
    service, rows = world.start(), make_world(301)
    await log(service, "b", rows[:300])
    await settled(service)
    again = world.start()
    await log(again, "b2", rows[300:])
    await settled(again)
    assert len(world.jobs) == 1


def ship(folder: Path, *, lies: bool = False) -> str:
    """Write a shipped predictor, of this world or of one of coin flips; return its folder."""
    folder.mkdir()
    training = train(
        make_world(200, seed=9, truth=not lies),
        (CODER, TALKER),
        seed=0,
        holdout_ratio=0.25,
        clock=lambda: 0.0,
    )
    (folder / "predictor.bin").write_bytes(training.artifact.to_bytes())
    return str(folder)


async def test_a_shipped_predictor_is_the_first_champion(world: World, tmp_path: Path) -> None:
    service = world.start(predictor=ship(tmp_path / "shipped"))
    assert (await published(service, Topic.PREDICTOR)).source == "shipped"
    await log(service, "b", make_world(60))
    await settled(service)
    assert world.jobs[0].champion == (tmp_path / "shipped" / "predictor.bin").read_bytes()


async def test_a_trained_champion_goes_before_the_shipped_one(world: World, tmp_path: Path) -> None:
    service = world.start()
    await log(service, "b", make_world(300))
    await settled(service)
    again = world.start(predictor=ship(tmp_path / "shipped"))
    assert (await again.status())["predictor_source"] == "trained"


async def test_an_unreadable_shipped_predictor_is_ignored_and_logged(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / SHIPPED_FILE).write_bytes(b"half a fi")
    with caplog.at_level(logging.WARNING):
        service = world.start(predictor=str(tmp_path / "shipped"))
    assert (await service.status())["predictor_source"] == "prior"
    assert SHIPPED_FILE in caplog.text


async def test_a_redeployment_changes_thresholds_but_not_where_the_log_lives(
    world: World,
) -> None:
    service = world.start(min_outcomes=1000)
    learning = service._learning
    await log(service, "b", make_world(100))
    await service.configure(make_fleet(), learning.model_copy(update={"min_outcomes": 50}))
    assert (await service.retrain())["reason"] != "too_few_outcomes"
    with pytest.raises(ConfigError, match="state_dir"):
        await service.configure(make_fleet(), learning.model_copy(update={"state_dir": "other"}))


async def test_retention_is_bounded(world: World) -> None:
    service = world.start(max_rows=1000, min_outcomes=10_000)
    await log(service, "b", make_world(1010))
    assert await service.prune() == 10
    assert (await service.status())["outcomes"] == 1000


async def test_a_shipped_champion_is_challenged_in_the_shadow_first(
    world: World, tmp_path: Path
) -> None:
    service = world.start(predictor=ship(tmp_path / "shipped", lies=True))
    await log(service, "b", make_world(300))
    await settled(service)
    assert (await published(service, Topic.PREDICTOR)).source == "shipped"
    challenger = (await published(service, Topic.CHALLENGER)).version
    status = await service.status()
    assert status["last_verdict"]["then"] == "shadow"
    assert status["predictors"].challenger == challenger
    world.clock.now += 60.0
    await service.tick()
    assert (await published(service, Topic.PREDICTOR)).version == challenger


async def test_an_operators_action_answers_with_the_list_and_is_published(
    world: World, tmp_path: Path
) -> None:
    service = world.start(predictor=ship(tmp_path / "shipped", lies=True), shadow_requests=0)
    await log(service, "b", make_world(300))
    await settled(service)
    trained = (await service.predictors())["data"][0]["version"]
    rolled = await service.change_predictor("rollback")
    assert {m["version"]: m["state"] for m in rolled["data"]}[trained] == "rolled_back"
    assert (await published(service, Topic.PREDICTOR)).source == "shipped"
    assert (await published(service, Topic.PREDICTORS)).last_change.before == trained
    again = world.start(predictor=str(tmp_path / "shipped"))
    assert (await again.status())["predictor_source"] == "shipped"
