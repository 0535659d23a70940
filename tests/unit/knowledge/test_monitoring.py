"""The knowledge actor tells the routers what it found, and trains when drift says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from calm_serve.knowledge.service import KnowledgeService
from calm_serve.learning.monitor import RETRAIN_OUTCOMES
from tests.knowledge_data import CODER, make_outcome, make_world
from tests.knowledge_world import World, settled


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


async def news(service: KnowledgeService, key: str) -> Any:
    """The newest value of one key of the board."""
    return (await service.board({}, 0.0))[key]["value"]


async def test_feedback_that_contradicts_the_predictions_reaches_the_routers(world: World) -> None:
    service = world.start()
    predicted = (0.9, 10.0, 0.05, 0.01, 1.0)
    rows = [make_outcome(f"o{i}", slm_id=CODER, predicted=predicted) for i in range(20)]
    await service.log("b1", rows)
    for row in rows:
        said = [{"source": "feedback", "value": 0.0, "at": 5.0}]
        await service.feedback(row.outcome_id, said)
    found = await news(service, "watch")
    assert found["calibration_factors"][CODER] < 0.4
    assert [a["kind"] for a in found["alarms"]] == ["quality"]


async def test_energy_books_are_published_with_the_next_tick(world: World) -> None:
    service = world.start()
    books = {"requests_j": 60.0, "idle_j": 30.0, "total_j": 90.0, "check_j": 100.0}
    await service.report_energy(CODER, "r1", {**books, "source": "estimate"})
    await service.tick()
    row = (await news(service, "energy"))[CODER]
    assert (row["idle_j"], row["attribution_error_ratio"]) == (30.0, 0.1)


async def test_drift_starts_a_training_that_waits_for_no_quota(world: World) -> None:
    service = world.start(min_outcomes=60, retrain_every=100_000)
    await service.log("before", make_world(60))
    await settled(service)
    world.jobs.clear()
    for number in range(200 + RETRAIN_OUTCOMES + 30):
        world.clock.now += 1.0
        tokens = 10 if number < 200 else 40
        predicted = (0.9, 10.0, 0.05, 0.01, 1.0)
        row = make_outcome(f"o{number}", slm_id=CODER, output_tokens=tokens, predicted=predicted)
        await service.log(f"b{number}", [row])
    await settled(service)
    assert len(world.jobs) == 1
