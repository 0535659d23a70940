"""The knowledge actor publishes what it found in the outcomes, and trains when they drift."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from calm_serve.learning.monitor import RETRAIN_OUTCOMES
from calm_serve.protocol.reports import ENERGY_REPORT, EnergyReport
from calm_serve.protocol.topics import Topic
from calm_serve.types import Prediction
from tests.knowledge_data import CODER, make_outcome, make_world
from tests.knowledge_world import World, log, published, settled


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.close()


async def test_feedback_that_contradicts_the_predictions_reaches_the_routers(world: World) -> None:
    service = world.start()
    predicted = Prediction(CODER, 0.9, 10.0, 0.05, 0.01, 1.0)
    rows = [make_outcome(f"o{i}", slm_id=CODER, predicted=predicted) for i in range(20)]
    await log(service, "b1", rows)
    for row in rows:
        signals = [{"source": "feedback", "value": 0.0, "at": 5.0}]
        await service.feedback(row.outcome_id, signals)
    found = await published(service, Topic.MONITOR)
    assert found.calibration_factors[CODER] < 0.4
    assert [a.kind for a in found.alarms] == ["quality"]


async def test_energy_reports_are_published_with_the_next_tick(world: World) -> None:
    service = world.start()
    report = EnergyReport(60.0, 30.0, total_j=90.0, check_j=100.0, source="estimate")
    await service.report_energy(CODER, "r1", ENERGY_REPORT.encode(report))
    assert await published(service, Topic.ENERGY) is None
    await service.tick()
    row = (await published(service, Topic.ENERGY))[CODER]
    assert (row.idle_j, row.attribution_error_ratio) == (30.0, 0.1)


async def test_drift_starts_a_training_that_waits_for_no_quota(world: World) -> None:
    service = world.start(min_outcomes=60, retrain_every=100_000)
    await log(service, "before", make_world(60))
    await settled(service)
    world.jobs.clear()
    for number in range(200 + RETRAIN_OUTCOMES + 30):
        world.clock.now += 1.0
        tokens = 10 if number < 200 else 40
        predicted = Prediction(CODER, 0.9, 10.0, 0.05, 0.01, 1.0)
        row = make_outcome(f"o{number}", slm_id=CODER, output_tokens=tokens, predicted=predicted)
        await log(service, f"b{number}", [row])
    await settled(service)
    assert len(world.jobs) == 1
