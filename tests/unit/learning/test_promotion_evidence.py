"""Promotion and rollback on the right evidence, whatever else happens at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from calm_serve.config import Goals
from calm_serve.learning.evaluation import live_calibration
from calm_serve.learning.promotion import Promotion
from calm_serve.testing import change_outcome
from calm_serve.types import Outcome, Prediction
from tests.logged_decisions import serve
from tests.promotion_desk import (
    BAD,
    BETTER,
    GOALS,
    GOOD,
    Desk,
    at_once,
    blob,
    predictor,
    shadowed,
    version,
)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


class Gate:
    """An `in_thread` whose next call waits until the test lets it go on."""

    def __init__(self) -> None:
        self.next_waits = False
        self.waiting, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, call: Callable[[], Any]) -> Any:
        if self.next_waits:
            self.next_waits = False
            self.waiting.set()
            await self.go_on.wait()
        return await at_once(call)


class Busy(asyncio.Lock):
    """A promotion's lock that says when somebody has to wait for it."""

    def __init__(self, promotion: Promotion) -> None:
        super().__init__()
        self.asked_again = asyncio.Event()
        promotion._lock = self

    async def acquire(self) -> Literal[True]:
        if self.locked():
            self.asked_again.set()
        return await super().acquire()


async def on_trial(desk: Desk, gate: Gate) -> Promotion:
    """BAD decides, GOOD decided before, and the log has what convicts BAD."""
    promotion = desk.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    desk.store.append(serve(80, GOALS, predictor(BAD)))
    promotion._in_thread = gate
    return promotion


async def test_a_verdict_on_one_champion_does_not_roll_back_the_next(desk: Desk) -> None:
    gate = Gate()
    promotion = await on_trial(desk, gate)
    busy, gate.next_waits = Busy(promotion), True
    promoting = asyncio.create_task(promotion.offer(blob(BETTER)))
    await gate.waiting.wait()
    check = asyncio.create_task(promotion.tick())
    await busy.asked_again.wait()
    gate.go_on.set()
    assert await promoting == "promoted"
    await check
    assert desk.decides == version(BETTER)


async def test_a_pin_that_comes_during_the_verdict_wins_and_ends_nothing(desk: Desk) -> None:
    gate = Gate()
    promotion = await on_trial(desk, gate)
    busy, gate.next_waits = Busy(promotion), True
    pinning = asyncio.create_task(promotion.pin(version(BAD)))
    await gate.waiting.wait()
    check = asyncio.create_task(promotion.tick())
    await busy.asked_again.wait()
    gate.go_on.set()
    await pinning
    await check
    assert desk.decides == version(BAD)


async def test_a_full_shadow_does_not_end_that_of_the_next_challenger(desk: Desk) -> None:
    promotion, gate = desk.start(shadow_requests=30), Gate()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    promotion._in_thread = gate
    busy, gate.next_waits = Busy(promotion), True
    replacing = asyncio.create_task(promotion.offer(blob(BETTER)))
    await gate.waiting.wait()
    full = asyncio.create_task(promotion.observe(shadowed(30, GOOD, BAD, start_s=desk.clock())))
    await busy.asked_again.wait()
    gate.go_on.set()
    assert await replacing == "shadow"
    await full
    assert (desk.decides, desk.board["challenger"].version) == (version(GOOD), version(BETTER))


async def test_a_shipped_predictor_that_was_rolled_back_does_not_come_again(
    desk: Desk, tmp_path: Path
) -> None:
    for name, training in (("old", GOOD), ("new", BAD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictor.bin").write_bytes(blob(training))
    promotion = desk.start()
    await promotion.ship(str(tmp_path / "old"))
    await promotion.ship(str(tmp_path / "new"))
    assert desk.decides == version(BAD)
    await promotion.rollback()
    await promotion.ship(str(tmp_path / "new"))  # the next router connects
    assert desk.decides == version(GOOD)
    desk.start(str(tmp_path / "new"))
    assert desk.decides == version(GOOD)


async def test_a_challenger_that_beat_a_champion_now_gone_is_not_taken(desk: Desk) -> None:
    promotion = desk.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    await promotion.rollback()  # while a training against BAD was running
    assert await promotion.offer(blob(BETTER), against=version(BAD)) == "outdated"
    assert (desk.decides, desk.board["challenger"]) == (version(GOOD), None)
    assert await promotion.offer(blob(BETTER), against=version(GOOD)) == "promoted"


def flattering(outcomes: list[Outcome]) -> list[Outcome]:
    """The same answers with every label the wrong way round: what BAD was trained on."""
    return [
        change_outcome(o, signals=tuple(replace(s, value=1.0 - s.value) for s in o.signals))
        for o in outcomes
    ]


async def test_a_challenger_is_not_judged_on_answers_from_before_it_came(desk: Desk) -> None:
    promotion = desk.start(shadow_requests=50)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BETTER))
    desk.store.append(flattering(serve(200, GOALS, predictor(GOOD), start_s=desk.clock())))
    desk.clock.advance(250.0)  # BAD is trained on these, and takes the place of BETTER
    await promotion.offer(blob(BAD))
    await desk.log(promotion, shadowed(50, GOOD, BAD, start_s=desk.clock()))
    assert (desk.decides, desk.board["challenger"]) == (version(GOOD), None)


def prediction_of(outcome: Outcome) -> Prediction:
    assert outcome.decision.predicted is not None
    return outcome.decision.predicted


def test_a_champion_answers_for_its_own_predictions_only() -> None:
    champion = predictor(GOOD)
    outcomes = serve(40, Goals(exploration_ratio=0.0), champion)
    # An SLM that it never saw: whoever stood in hoped for more than came.
    strangers = [
        change_outcome(
            o,
            outcome_id=f"new-{o.outcome_id}",
            slm_id="newcomer",
            predicted=replace(prediction_of(o), slm_id="newcomer", success_ratio=0.99),
            signals=tuple(replace(s, value=0.0) for s in o.signals),
        )
        for o in outcomes
    ]
    found = live_calibration([*outcomes, *strangers], GOOD.artifact, BETTER.artifact)
    assert found is not None
    assert (found.labelled, found.surely_worse) == (40, False)
