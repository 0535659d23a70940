"""Promotion: shadow, post-promotion evaluation, rollback, pins. A restart is a new object."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from calm_serve.errors import RequestError
from calm_serve.learning.evaluation import MIN_LIVE_LABELS, compare_live
from calm_serve.learning.promotion import SHADOW_MAX_S
from calm_serve.learning.shadow import COMPARISONS_PER_S, Shadow
from calm_serve.testing import FakeClock
from tests.logged_decisions import serve
from tests.promotion_world import (
    BAD,
    BETTER,
    GOALS,
    GOOD,
    PromotionWorld,
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


async def test_without_a_shadow_a_challenger_is_promoted_at_once(world: PromotionWorld) -> None:
    promotion = world.start()
    assert await promotion.offer(blob(GOOD)) == "promoted"
    assert world.champion == version(GOOD)
    assert await promotion.offer(blob(BETTER)) == "promoted"
    assert (world.champion, world.status.previous) == (version(BETTER), version(GOOD))


async def test_the_first_predictor_needs_no_comparison(world: PromotionWorld) -> None:
    promotion = world.start(shadow_requests=50)
    assert await promotion.offer(blob(GOOD)) == "promoted"


async def test_a_challenger_stays_in_the_shadow_for_so_many_requests(world: PromotionWorld) -> None:
    promotion = world.start(shadow_requests=40)
    await promotion.offer(blob(GOOD))
    assert await promotion.offer(blob(BETTER)) == "shadow"
    assert (world.champion, world.challenger) == (version(GOOD), version(BETTER))
    outcomes = shadowed(40, GOOD, BETTER, start_s=world.clock())
    await world.log(promotion, outcomes[:39])
    assert world.champion == version(GOOD)
    report = world.status.shadow
    assert report.requests == 39
    assert 0.5 < report.agreement_ratio <= 1.0
    assert report.predicted_gain_ci95[0] >= 0.0
    await world.log(promotion, outcomes[39:])
    assert (world.champion, world.challenger) == (version(BETTER), "")
    change = world.status.last_change
    assert change.action == "promoted"
    assert "shadow of 40 requests" in change.reason


async def test_a_challenger_that_is_worse_on_live_labels_is_rejected_for_good(
    world: PromotionWorld,
) -> None:
    promotion = world.start(shadow_requests=60)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    await world.log(promotion, shadowed(60, GOOD, BAD, start_s=world.clock()))
    assert (world.champion, world.challenger) == (version(GOOD), "")
    (entry,) = [m for m in promotion.document()["data"] if m["version"] == version(BAD)]
    assert entry["state"] == "rejected"
    assert "live log loss is worse" in entry["note"]
    assert await promotion.offer(blob(BAD)) == "refused"


async def test_with_thin_traffic_the_shadow_ends_by_time(world: PromotionWorld) -> None:
    promotion = world.start(shadow_requests=50)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BETTER))
    world.clock.advance(SHADOW_MAX_S - 1.0)
    await promotion.tick()
    assert world.champion == version(GOOD)
    world.clock.advance(1.0)
    await promotion.tick()
    assert world.champion == version(BETTER)


async def test_a_replaced_challenger_does_not_restart_the_wait(world: PromotionWorld) -> None:
    promotion = world.start(shadow_requests=50)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    world.clock.advance(SHADOW_MAX_S - 1.0)
    await promotion.offer(blob(BETTER))
    world.clock.advance(1.0)
    await promotion.tick()
    assert world.champion == version(BETTER)


async def test_a_worse_champion_is_rolled_back_and_not_tried_again(
    world: PromotionWorld, caplog: pytest.LogCaptureFixture
) -> None:
    promotion = world.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    with caplog.at_level(logging.WARNING):
        await world.log(promotion, serve(80, GOALS, predictor(BAD)))
    assert world.champion == version(GOOD)
    change = world.status.last_change
    assert (change.action, change.before) == ("rolled_back", version(BAD))
    assert "log loss" in change.reason and "80 labelled outcomes" in change.reason
    assert version(BAD) in caplog.text
    states = {m["version"]: m["state"] for m in promotion.document()["data"]}
    assert states == {version(GOOD): "champion", version(BAD): "rolled_back"}
    assert await promotion.offer(blob(BAD)) == "refused"


async def test_a_good_champion_stays_and_its_evaluation_is_published(world: PromotionWorld) -> None:
    promotion = world.start()
    await promotion.offer(blob(BAD))
    await promotion.offer(blob(GOOD))
    await world.log(promotion, serve(80, GOALS, predictor(GOOD)))
    assert world.champion == version(GOOD)
    found = world.status.post_promotion
    assert found.labelled == 80
    assert found.gain_ci95[0] > 0.0
    assert found.calibration_error < found.previous_calibration_error


async def test_outcomes_of_another_predictor_are_no_evidence(world: PromotionWorld) -> None:
    promotion = world.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    await world.log(promotion, serve(80, GOALS, predictor(GOOD)))
    assert world.champion == version(BAD)
    assert world.status.post_promotion is None


def test_a_handful_of_labels_is_no_evidence() -> None:
    outcomes = serve(MIN_LIVE_LABELS, GOALS, predictor(BAD))
    assert compare_live(outcomes[1:], BAD.artifact, GOOD.artifact) is None
    found = compare_live(outcomes, BAD.artifact, GOOD.artifact)
    assert found is not None and found.surely_worse


def test_two_equally_good_predictors_are_hardly_ever_called_different() -> None:
    worse = 0
    for seed in range(20):
        outcomes = serve(100, GOALS, predictor(GOOD), seed=seed)
        found = compare_live(outcomes, GOOD.artifact, BETTER.artifact)
        worse += found is not None and found.surely_worse
    assert worse == 0


async def test_everything_survives_a_restart(world: PromotionWorld) -> None:
    promotion = world.start(shadow_requests=50)
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BETTER))
    world.start(shadow_requests=50)
    assert world.champion == version(GOOD)
    assert world.challenger == version(BETTER)
    again = world.start()
    await again.offer(blob(BAD))
    third = world.start()
    await world.log(third, serve(80, GOALS, predictor(BAD)))
    assert world.champion == version(GOOD)
    world.start()
    assert world.champion == version(GOOD)
    assert world.status.last_change.action == "rolled_back"


async def test_a_pin_decides_until_it_is_taken_off(world: PromotionWorld) -> None:
    promotion = world.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BAD))
    await promotion.act("pin", version(GOOD))
    assert (world.champion, world.status.pinned) == (version(GOOD), version(GOOD))
    assert await promotion.offer(blob(BETTER)) == "shadow"
    world.clock.advance(SHADOW_MAX_S + 1.0)
    await promotion.tick()
    assert world.champion == version(GOOD)
    with pytest.raises(RequestError, match="pinned"):
        await promotion.act("rollback", "")
    again = world.start()
    assert (world.champion, world.status.pinned) == (version(GOOD), version(GOOD))
    await again.act("unpin", "")
    world.clock.advance(SHADOW_MAX_S + 1.0)
    await again.tick()
    assert world.champion == version(BETTER)


async def test_an_operator_rolls_back_by_hand(world: PromotionWorld) -> None:
    promotion = world.start()
    await promotion.offer(blob(GOOD))
    await promotion.offer(blob(BETTER))
    await promotion.act("rollback", "")
    assert world.champion == version(GOOD)
    with pytest.raises(RequestError, match="no previous"):
        await promotion.act("rollback", "")


@pytest.mark.parametrize(("action", "message"), [("pin", "'v9'"), ("retire", "known: pin")])
async def test_what_cannot_be_done_is_refused(
    world: PromotionWorld, action: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        await world.start().act(action, "v9")


def test_a_router_compares_a_bounded_share_of_its_requests() -> None:
    clock = FakeClock()
    shadow = Shadow(clock)
    outcomes = serve(4, GOALS, predictor(GOOD))
    assert shadow.compare(outcomes[0]) is None
    shadow.challenger = predictor(BETTER)
    assert shadow.compare(outcomes[1]) is not None
    assert shadow.compare(outcomes[2]) is None
    clock.advance(1.0 / COMPARISONS_PER_S)
    assert shadow.compare(outcomes[3]) is not None


def test_a_router_logs_what_the_challenger_would_have_chosen() -> None:
    found = [o.decision.shadow for o in shadowed(60, GOOD, BAD)]
    assert {f.version for f in found} == {version(BAD)}
    assert sum(f.agrees for f in found) < 10  # it was trained on inverted labels
    assert all(f.gain >= 0.0 for f in found)
    agreeing = [o.decision.shadow for o in shadowed(60, GOOD, GOOD)]
    assert all(f.agrees for f in agreeing)
    assert all(f.gain == 0.0 for f in agreeing)
