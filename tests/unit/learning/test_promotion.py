"""Who decides: challengers in the shadow, probation, rollback, pins. A restart is a new object."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from calm_serve.errors import RequestError
from calm_serve.learning.evaluation import MIN_LABELLED, live_calibration
from calm_serve.learning.promotion import SHADOW_MAX_S
from calm_serve.learning.shadow import COMPARISONS_PER_S, Shadow
from calm_serve.testing import FakeClock
from calm_serve.types import Outcome, ShadowChoice
from tests.logged_decisions import serve
from tests.promotion_desk import (
    BAD,
    BETTER,
    GOALS,
    GOOD,
    Desk,
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


async def test_without_a_shadow_a_winner_decides_at_once(desk: Desk) -> None:
    promotion = desk.start()
    assert await promotion.offer(blob(GOOD)) == "promoted"
    assert desk.decides == version(GOOD)
    assert await promotion.offer(blob(BETTER)) == "promoted"
    assert (desk.decides, desk.board["predictors"].previous) == (version(BETTER), version(GOOD))


async def test_the_first_predictor_has_nobody_to_be_compared_with(desk: Desk) -> None:
    promotion = desk.start(shadow_requests=50)
    assert await promotion.offer(blob(GOOD)) == "promoted"


async def test_a_challenger_decides_silently_until_enough_was_compared(desk: Desk) -> None:
    promotion = desk.start(shadow_requests=40)
    await promotion.offer(blob(GOOD))
    assert await promotion.offer(blob(BETTER)) == "shadow"
    assert (desk.decides, desk.board["challenger"].version) == (version(GOOD), version(BETTER))
    outcomes = shadowed(40, GOOD, BETTER, start_s=desk.clock())
    await desk.log(promotion, outcomes[:39])
    assert desk.decides == version(GOOD)
    report = desk.board["predictors"].shadow
    assert report.requests == 39
    assert 0.5 < report.agreement_ratio <= 1.0
    assert report.predicted_gain_ci95[0] >= 0.0
    await desk.log(promotion, outcomes[39:])
    assert (desk.decides, desk.board["challenger"]) == (version(BETTER), None)
    change = desk.board["predictors"].last_change
    assert change.action == "promoted"
    assert "shadow of 40 requests" in change.reason


async def test_a_challenger_that_live_labels_contradict_is_rejected_for_good(desk: Desk) -> None:
    promotion = desk.start(shadow_requests=60)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    await desk.log(promotion, shadowed(60, GOOD, BAD, start_s=desk.clock()))
    assert (desk.decides, desk.board["challenger"]) == (version(GOOD), None)
    (entry,) = [m for m in promotion.document()["data"] if m["version"] == version(BAD)]
    assert entry["state"] == "rejected"
    assert "live log loss is worse" in entry["note"]
    assert await promotion.offer(blob(BAD)) == "refused"


async def test_thin_traffic_does_not_hold_a_better_predictor_back(desk: Desk) -> None:
    promotion = desk.start(shadow_requests=50)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BETTER))
    desk.clock.advance(SHADOW_MAX_S - 1.0)
    await promotion.tick()
    assert desk.decides == version(GOOD)
    desk.clock.advance(1.0)
    await promotion.tick()
    assert desk.decides == version(BETTER)


async def test_the_wait_goes_on_when_a_challenger_is_replaced(desk: Desk) -> None:
    promotion = desk.start(shadow_requests=50)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    desk.clock.advance(SHADOW_MAX_S - 1.0)
    await promotion.offer(blob(BETTER))
    desk.clock.advance(1.0)
    await promotion.tick()
    assert desk.decides == version(BETTER)


async def test_a_worse_champion_is_rolled_back_and_not_tried_again(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    promotion = desk.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    with caplog.at_level(logging.WARNING):
        await desk.log(promotion, serve(80, GOALS, predictor(BAD)))
    assert desk.decides == version(GOOD)
    change = desk.board["predictors"].last_change
    assert (change.action, change.before) == ("rolled_back", version(BAD))
    assert "log loss" in change.reason and "80 labelled outcomes" in change.reason
    assert version(BAD) in caplog.text
    states = {m["version"]: m["state"] for m in promotion.document()["data"]}
    assert states == {version(GOOD): "champion", version(BAD): "rolled_back"}
    assert await promotion.offer(blob(BAD)) == "refused"


async def test_a_good_champion_stays_and_its_probation_is_visible(desk: Desk) -> None:
    promotion = desk.start()
    await promotion.offer(blob(BAD))
    await promotion.offer(blob(GOOD))
    await desk.log(promotion, serve(80, GOALS, predictor(GOOD)))
    assert desk.decides == version(GOOD)
    probation = desk.board["predictors"].post_promotion
    assert probation.labelled == 80
    assert probation.gain_ci95[0] > 0.0
    assert probation.calibration_error < probation.previous_calibration_error


async def test_outcomes_of_another_predictor_put_nobody_on_trial(desk: Desk) -> None:
    promotion = desk.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    await desk.log(promotion, serve(80, GOALS, predictor(GOOD)))
    assert desk.decides == version(BAD)
    assert desk.board["predictors"].post_promotion is None


def test_a_handful_of_labels_convicts_nobody() -> None:
    outcomes = serve(MIN_LABELLED, GOALS, predictor(BAD))
    assert live_calibration(outcomes[1:], BAD.artifact, GOOD.artifact) is None
    found = live_calibration(outcomes, BAD.artifact, GOOD.artifact)
    assert found is not None and found.surely_worse


def test_two_that_are_as_good_are_hardly_ever_told_apart() -> None:
    convicted = 0
    for seed in range(20):
        outcomes = serve(100, GOALS, predictor(GOOD), seed=seed)
        found = live_calibration(outcomes, GOOD.artifact, BETTER.artifact)
        convicted += found is not None and found.surely_worse
    assert convicted == 0


async def test_everything_survives_a_restart(desk: Desk) -> None:
    promotion = desk.start(shadow_requests=50)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BETTER))
    desk.start(shadow_requests=50)
    assert desk.decides == version(GOOD)
    assert desk.board["challenger"].version == version(BETTER)
    again = desk.start()
    await again.offer(blob(BAD))
    third = desk.start()
    await desk.log(third, serve(80, GOALS, predictor(BAD)))
    assert desk.decides == version(GOOD)
    desk.start()
    assert desk.decides == version(GOOD)
    assert desk.board["predictors"].last_change.action == "rolled_back"


async def test_a_pin_decides_until_it_is_taken_off(desk: Desk) -> None:
    promotion = desk.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    await promotion.act("pin", version(GOOD))
    assert (desk.decides, desk.board["predictors"].pinned) == (version(GOOD), version(GOOD))
    assert await promotion.offer(blob(BETTER)) == "shadow"
    desk.clock.advance(SHADOW_MAX_S + 1.0)
    await promotion.tick()
    assert desk.decides == version(GOOD)
    with pytest.raises(RequestError, match="pinned"):
        await promotion.act("rollback", "")
    again = desk.start()
    assert (desk.decides, desk.board["predictors"].pinned) == (version(GOOD), version(GOOD))
    await again.act("unpin", "")
    desk.clock.advance(SHADOW_MAX_S + 1.0)
    await again.tick()
    assert desk.decides == version(BETTER)


async def test_an_operator_rolls_back_by_hand(desk: Desk) -> None:
    promotion = desk.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BETTER))
    await promotion.act("rollback", "")
    assert desk.decides == version(GOOD)
    with pytest.raises(RequestError, match="no previous"):
        await promotion.act("rollback", "")


@pytest.mark.parametrize(("action", "message"), [("pin", "'v9'"), ("retire", "known: pin")])
async def test_what_cannot_be_done_is_refused(desk: Desk, action: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        await desk.start().act(action, "v9")


async def test_a_predictor_of_an_earlier_version_of_this_program_goes_on(desk: Desk) -> None:
    (desk.folder / "champion.bin").write_bytes(blob(GOOD))
    desk.start()
    assert desk.decides == version(GOOD)
    desk.start()
    assert desk.decides == version(GOOD)
    assert not (desk.folder / "champion.bin").exists()


def test_a_router_compares_a_bounded_share_of_its_requests() -> None:
    clock = FakeClock()
    shadow = Shadow(clock)
    outcomes = serve(4, GOALS, predictor(GOOD))
    found = [shadow.compare(outcomes[0])]
    shadow.challenger = predictor(BETTER)
    found += [shadow.compare(outcomes[1]), shadow.compare(outcomes[2])]
    clock.advance(1.0 / COMPARISONS_PER_S)
    found.append(shadow.compare(outcomes[3]))
    assert [f is not None for f in found] == [False, True, False, True]


def choices(outcomes: list[Outcome]) -> list[ShadowChoice]:
    return [o.decision.shadow for o in outcomes if o.decision.shadow is not None]


def test_a_router_writes_down_what_the_challenger_would_have_done() -> None:
    found = choices(shadowed(60, GOOD, BAD))
    assert len(found) == 60
    assert {f.version for f in found} == {version(BAD)}
    assert sum(f.agrees for f in found) < 10  # it has everything the wrong way round
    assert all(f.gain >= 0.0 for f in found)
    agreeing = choices(shadowed(60, GOOD, GOOD))
    assert len(agreeing) == 60
    assert all(f.agrees and f.gain == 0.0 for f in agreeing)
