"""Fits of SLMs that the champion does not know, as they are published."""

from __future__ import annotations

import asyncio

from calm_serve.config import Fleet
from calm_serve.learning.cold_start import ColdStartSLMs, ColdStartTrainer, fit_cold_start
from calm_serve.prediction.artifact import Artifact
from calm_serve.protocol.topics import PublishedPredictor
from calm_serve.testing import make_fleet, make_spec

PRIORS = {"quality": 0.05, "skill_quality": 0.9}
FLEET = make_fleet(
    make_spec("old", examples=tuple(f"list files of {i}" for i in range(16)), priors=PRIORS)
)
JOINED = make_spec("new", examples=tuple(f"bake cake number {i}" for i in range(16)), priors=PRIORS)


def champion_of(fleet: Fleet) -> Artifact:
    new_slms = ColdStartSLMs()
    new_slms.follow(fleet, known=())
    job = new_slms.job()
    assert job is not None
    champion = fit_cold_start(job, 0.0)
    assert champion is not None
    return champion


BOTH = make_fleet(*FLEET.slms, JOINED)


def test_an_slm_that_joins_is_fitted_once_until_a_champion_knows_it() -> None:
    published: list[PublishedPredictor | None] = []
    knows_both = champion_of(BOTH)
    boosters = {k: v for k, v in knows_both.boosters.items() if k.endswith(":old")}
    starts = {"old": knows_both.starts["old"]}
    knows_old = Artifact("champion", ("old",), boosters, {}, 32, 0.0, starts)

    async def go() -> None:
        trainer = ColdStartTrainer(published.append, lambda: 0.0)
        await trainer.fit_if_due(FLEET, (), knows_old)
        assert published == []
        await trainer.fit_if_due(FLEET, (JOINED,), knows_old)
        await trainer.fit_if_due(FLEET, (JOINED,), knows_old)
        await trainer.fit_if_due(FLEET, (JOINED,), knows_both)

    asyncio.run(go())
    first, last = published
    assert first is not None
    assert Artifact.from_bytes(first.blob).slm_ids == ("new",)
    assert last is None


def test_without_a_champion_no_slm_is_fitted() -> None:
    published: list[PublishedPredictor | None] = []
    trainer = ColdStartTrainer(published.append, lambda: 0.0)
    asyncio.run(trainer.fit_if_due(FLEET, (JOINED,), None))
    assert published == []
