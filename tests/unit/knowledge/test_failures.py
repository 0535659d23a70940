"""What one failing part of the knowledge service does not do to the others, and what is kept."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from calm_serve.config import ResidencyOptions
from calm_serve.errors import RequestError
from calm_serve.knowledge import service as service_module
from calm_serve.knowledge.background import Ticker, take_steps
from calm_serve.learning.shadow import ShadowTally
from calm_serve.learning.training import train
from calm_serve.testing import change_outcome
from calm_serve.types import QualitySignal, ShadowChoice
from tests.knowledge_data import CODER, TALKER, make_fleet, make_outcome, make_spec, make_world
from tests.knowledge_world import World, log, register, settled


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


def broken(*args: Any) -> None:
    raise RequestError(f"cannot do this with {len(args)} arguments")


async def test_outcomes_that_are_durable_are_acknowledged_whatever_fails_afterwards(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    service = world.start()
    service._learner._monitor.observe = broken  # type: ignore[method-assign, assignment]
    with caplog.at_level(logging.WARNING):
        assert await log(service, "b", [make_outcome("a")]) == ["a"]
        assert await service.feedback("a", [QualitySignal("feedback", 1.0, 1.0)]) is True
    assert (await service.status())["labelled"] == 1
    assert "cannot do this" in caplog.text


async def test_one_failing_part_does_not_stop_the_others(world: World) -> None:
    service = world.start(min_outcomes=60)
    service._learner._cold_start.observe = broken  # type: ignore[method-assign, assignment]
    await log(service, "b", make_world(70))
    await settled(service)
    assert len(world.jobs) == 1
    service._learner.promotion.tick = broken  # type: ignore[assignment, method-assign]
    await register(service, make_spec("later"), "app2")
    world.clock.now += 60.0
    await service.tick()
    assert (await service.status())["registered"] == []


async def test_background_work_goes_on_after_a_tick_that_failed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "TICK_S", 0.0)
    service, again = world.start(), asyncio.Event()

    def fail_twice() -> None:
        if service._ticks >= 2:
            again.set()
        broken()

    service._learner.promotion.tick = fail_twice  # type: ignore[assignment, method-assign]
    await log(service, "b", [make_outcome("a")])
    async with asyncio.timeout(10.0):
        await again.wait()


async def test_steps_are_taken_in_order_and_awaited(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[str] = []

    async def later() -> None:
        taken.append("later")

    with caplog.at_level(logging.WARNING):
        await take_steps(lambda: taken.append("first"), broken, later)
    assert taken == ["first", "later"]
    assert "cannot do this" in caplog.text


async def test_a_ticker_that_was_stopped_before_its_start_ends_without_a_tick() -> None:
    ticks: list[str] = []
    ticker = Ticker(lambda: take_steps(lambda: ticks.append("tick")), 0.001)
    await ticker.stop()
    ticker.start()
    assert ticker._task is not None
    async with asyncio.timeout(10.0):
        await ticker._task
    assert ticks == []


async def test_an_outcome_that_is_sent_again_is_counted_once(world: World) -> None:
    service = world.start()
    tally = service._learner.promotion._tally = ShadowTally("v1", 0.0, 0.0)
    shadow = ShadowChoice("v1", CODER, agrees=True, success_ratio=0.5, gain=0.0)
    rows = [change_outcome(o, shadow=shadow) for o in make_world(3)]
    await log(service, "b1", [rows[0], rows[0]])
    await log(service, "b1", rows)
    assert tally.requests == 3


@pytest.mark.parametrize(
    "bad",
    [
        {"shadow": ShadowChoice("v1", CODER, agrees=True, success_ratio=0.5, gain=math.nan)},
        {"signals": (QualitySignal("feedback", math.nan, 1.0),)},
        {"energy_j": math.inf},
    ],
)
async def test_a_row_that_no_store_takes_does_not_cost_its_batch(
    world: World, bad: dict[str, Any]
) -> None:
    service = world.start()
    rows = [make_outcome("bad", **bad), make_outcome("good")]
    assert set(await log(service, "b", rows)) == {"bad", "good"}
    status = await service.status()
    assert (status["outcomes"], status["refused_rows"]) == (1, 1)


async def test_a_restarted_actor_goes_on_with_what_was_configured_last(world: World) -> None:
    service = world.start(min_outcomes=1000)
    grown = make_fleet().model_copy(update={"slms": (*make_fleet().slms, make_spec("third"))})
    learning = service._learning.model_copy(update={"min_outcomes": 50})
    await service.configure(grown, learning)
    again = world.start(min_outcomes=1000, resume=True)  # with the arguments of its first start
    await log(again, "b", make_world(60))
    await settled(again)
    assert [job.slm_ids for job in world.jobs] == [(CODER, TALKER, "third")]


async def test_a_new_actor_starts_with_what_it_is_given(world: World) -> None:
    service = world.start()
    await service.configure(make_fleet(), service._learning)
    assert world.start(min_outcomes=777)._learning.min_outcomes == 777
    assert world.start(min_outcomes=777, resume=True)._learning.min_outcomes == 60


async def test_a_redeployed_fleet_brings_its_own_predictor(world: World, tmp_path: Path) -> None:
    old, new = (
        train(
            make_world(200, seed=seed),
            (CODER, TALKER),
            seed=0,
            holdout_ratio=0.25,
            clock=world.clock,
        ).artifact
        for seed in (8, 9)
    )
    for name, artifact in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictor.bin").write_bytes(artifact.to_bytes())
    service = world.start(predictor=str(tmp_path / "old"))
    grown = make_fleet(predictor=str(tmp_path / "new"))
    await service.configure(grown, service._learning)
    status = await service.status()
    assert (status["predictor"], status["predictors"].previous) == (new.version, old.version)
    await service.change_predictor("pin", old.version)
    await service.configure(grown, service._learning)
    assert (await service.status())["predictor"] == old.version


async def test_what_another_version_wrote_down_does_not_stop_a_start(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    service = world.start()
    await register(service, make_spec("fine"), "app2")
    stored = json.loads(service._store.meta("registry") or "{}")
    stored["record"]["odd"] = {"spec": {"id": "odd", "gone_field": 1}, "app_name": "app3"}
    service._store.set_meta("registry", json.dumps(stored))
    service._store.set_meta("residency", json.dumps({"options": {"gone_field": 1}}))
    service._store.set_meta("settings", json.dumps({"fleet": {"gone_field": 1}, "learning": {}}))
    with caplog.at_level(logging.WARNING):
        again = world.start(resume=True)
    assert (await again.status())["registered"] == ["fine"]
    assert "odd" in caplog.text


KEYS = ("registry", "residency", "settings")


async def test_what_the_former_build_stored_is_read(world: World) -> None:
    service = world.start()
    await register(service, make_spec("fine"), "app2")
    learning = service._learning.model_copy(update={"min_outcomes": 50})
    await service.configure(make_fleet(), learning)
    await service.configure_residency(ResidencyOptions(memory_budget_bytes=10), 0.2, 0.02)
    names = []
    for key in KEYS:
        stored = json.loads(service._store.meta(key) or "")
        names.append((stored["format"], stored["version"]))
        service._store.set_meta(key, json.dumps(stored["record"]))  # without name and version
    assert names == [("registered_slms", 1), ("residency_settings", 1), ("settings", 1)]
    again = world.start(resume=True)
    assert (await again.status())["registered"] == ["fine"]
    assert (again._fleet, again._learning) == (make_fleet(), learning)
    summary = again._residency.summary()
    assert summary is not None
    assert summary.budget_bytes == 10


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "%s", "version": 2, "record": {}}'])
async def test_stored_texts_that_cannot_be_read_are_named_in_the_log_and_stay(
    world: World, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    service = world.start()
    texts = {
        key: text.replace("%s", name)
        for key, name in zip(
            KEYS, ("registered_slms", "residency_settings", "settings"), strict=True
        )
    }
    for key, stored in texts.items():
        service._store.set_meta(key, stored)
    with caplog.at_level(logging.WARNING):
        again = world.start(min_outcomes=777, resume=True)
    assert again._learning.min_outcomes == 777
    assert (await again.status())["registered"] == []
    for key, stored in texts.items():
        assert again._store.meta(key) == stored
        assert f"stored {key!r} ignored" in caplog.text


async def test_a_training_that_won_against_a_champion_now_gone_changes_nothing(
    world: World,
) -> None:
    service, rows = world.start(min_outcomes=1000), make_world(300)
    await log(service, "b1", rows)
    meanwhile = train(rows[:200], (CODER, TALKER), seed=0, holdout_ratio=0.25, clock=world.clock)

    async def publish_another() -> None:
        await service._learner.promotion.offer(meanwhile.artifact.to_bytes())

    world.before_training = publish_another
    verdict = await service.retrain(force=True)
    assert (verdict["publish"], verdict["against"]) == (True, "base_rate")
    assert verdict["then"] == "outdated"
    assert (await service.status())["predictor"] == meanwhile.artifact.version


async def test_the_last_verdict_names_a_training_that_could_not_begin(world: World) -> None:
    service = world.start()

    def no_memory() -> None:
        raise OSError("cannot allocate memory")

    world.before_training = no_memory
    await log(service, "b", make_world(70))
    await settled(service)
    assert (await service.status())["last_verdict"]["detail"] == "cannot allocate memory"
