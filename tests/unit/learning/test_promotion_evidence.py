"""Promotion and rollback under concurrent changes, on the right evidence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from calm_serve.config import Goals
from calm_serve.learning.evaluation import compare_live
from calm_serve.learning.promotion import Promotion
from calm_serve.testing import change_outcome
from calm_serve.types import Outcome
from tests.logged_decisions import serve
from tests.promotion_world import (
    BAD,
    BETTER,
    GOALS,
    GOOD,
    PromotionWorld,
    at_once,
    blob,
    predictor,
    shadowed,
    version,
)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[PromotionWorld]:
    made = PromotionWorld(tmp_path)
    yield made
    made.store.close()


class PausedThread:
    """An `in_thread` whose next call waits until the test sets `go_on`."""

    def __init__(self) -> None:
        self.next_waits = False
        self.waiting, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, call: Callable[[], Any]) -> Any:
        if self.next_waits:
            self.next_waits = False
            self.waiting.set()
            await self.go_on.wait()
        return await at_once(call)


class ObservedLock(asyncio.Lock):
    """A promotion's lock that signals when a second task waits for it."""

    def __init__(self, promotion: Promotion) -> None:
        super().__init__()
        self.contended = asyncio.Event()
        promotion._lock = self

    async def acquire(self) -> Literal[True]:
        if self.locked():
            self.contended.set()
        return await super().acquire()


async def worse_champion(world: PromotionWorld, thread: PausedThread) -> Promotion:
    """BAD is the champion, GOOD the previous one, and the log shows that BAD is worse."""
    promotion = world.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    world.store.append(serve(80, GOALS, predictor(BAD)))
    promotion._in_thread = thread
    return promotion


async def test_a_verdict_on_one_champion_does_not_roll_back_the_next(world: PromotionWorld) -> None:
    thread = PausedThread()
    promotion = await worse_champion(world, thread)
    lock, thread.next_waits = ObservedLock(promotion), True
    promoting = asyncio.create_task(promotion.offer(blob(BETTER)))
    await thread.waiting.wait()
    check = asyncio.create_task(promotion.tick())
    await lock.contended.wait()
    thread.go_on.set()
    assert await promoting == "promoted"
    await check
    assert world.champion == version(BETTER)


async def test_a_pin_during_the_evaluation_prevents_the_rollback(world: PromotionWorld) -> None:
    thread = PausedThread()
    promotion = await worse_champion(world, thread)
    lock, thread.next_waits = ObservedLock(promotion), True
    pinning = asyncio.create_task(promotion.pin(version(BAD)))
    await thread.waiting.wait()
    check = asyncio.create_task(promotion.tick())
    await lock.contended.wait()
    thread.go_on.set()
    await pinning
    await check
    assert world.champion == version(BAD)


async def test_the_end_of_one_shadow_does_not_end_the_next_challengers(
    world: PromotionWorld,
) -> None:
    promotion, thread = world.start(shadow_requests=30), PausedThread()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    promotion._in_thread = thread
    lock, thread.next_waits = ObservedLock(promotion), True
    replacing = asyncio.create_task(promotion.offer(blob(BETTER)))
    await thread.waiting.wait()
    full = asyncio.create_task(promotion.observe(shadowed(30, GOOD, BAD, start_s=world.clock())))
    await lock.contended.wait()
    thread.go_on.set()
    assert await replacing == "shadow"
    await full
    assert (world.champion, world.challenger) == (version(GOOD), version(BETTER))


async def test_a_shipped_predictor_that_was_rolled_back_is_not_promoted_again(
    world: PromotionWorld, tmp_path: Path
) -> None:
    for name, training in (("old", GOOD), ("new", BAD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictor.bin").write_bytes(blob(training))
    promotion = world.start()
    await promotion.ship(str(tmp_path / "old"))
    await promotion.ship(str(tmp_path / "new"))
    assert world.champion == version(BAD)
    await promotion.rollback()
    await promotion.ship(str(tmp_path / "new"))  # the next router connects
    assert world.champion == version(GOOD)
    world.start(str(tmp_path / "new"))
    assert world.champion == version(GOOD)


async def test_a_challenger_that_beat_a_replaced_champion_is_not_taken(
    world: PromotionWorld,
) -> None:
    promotion = world.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    await promotion.rollback()  # while a training against BAD was running
    assert await promotion.offer(blob(BETTER), against=version(BAD)) == "outdated"
    assert (world.champion, world.challenger) == (version(GOOD), "")
    assert await promotion.offer(blob(BETTER), against=version(GOOD)) == "promoted"


def inverted(outcomes: list[Outcome]) -> list[Outcome]:
    """The same answers with inverted labels, as BAD was trained on."""
    return [
        change_outcome(o, signals=tuple(replace(s, value=1.0 - s.value) for s in o.signals))
        for o in outcomes
    ]


async def test_a_challenger_is_compared_only_on_answers_since_it_was_offered(
    world: PromotionWorld,
) -> None:
    promotion = world.start(shadow_requests=50)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BETTER))
    world.store.append(inverted(serve(200, GOALS, predictor(GOOD), start_s=world.clock())))
    world.clock.advance(250.0)  # BAD is trained on these, and replaces BETTER
    await promotion.offer(blob(BAD))
    await world.log(promotion, shadowed(50, GOOD, BAD, start_s=world.clock()))
    assert (world.champion, world.challenger) == (version(GOOD), "")


def test_a_champion_is_evaluated_on_its_own_predictions_only() -> None:
    champion = predictor(GOOD)
    outcomes = serve(40, Goals(exploration_ratio=0.0), champion)
    # An SLM that the champion does not know: another predictor was too optimistic about it.
    unknown = [
        change_outcome(
            o,
            outcome_id=f"new-{o.outcome_id}",
            slm_id="unknown",
            predicted=replace(o.decision.predicted, slm_id="unknown", success_ratio=0.99),
            signals=tuple(replace(s, value=0.0) for s in o.signals),
        )
        for o in outcomes
    ]
    found = compare_live([*outcomes, *unknown], GOOD.artifact, BETTER.artifact)
    assert found is not None
    assert (found.labelled, found.surely_worse) == (40, False)
