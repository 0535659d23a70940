"""Promotions on one folder and store, three predictors to promote, and outcomes under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from calm_serve.config import Goals, Learning
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.learning.promotion import Promotion
from calm_serve.learning.shadow import Shadow
from calm_serve.learning.training import Training, train
from calm_serve.prediction.base import MetadataPrior
from calm_serve.prediction.lightgbm import LightGBMPredictor
from calm_serve.protocol.topics import PredictorStatus, Topic
from calm_serve.testing import FakeClock, change_outcome
from calm_serve.types import Outcome
from tests.knowledge_data import CODER, TALKER, make_world
from tests.logged_decisions import serve

GOALS = Goals(exploration_ratio=0.2)


def trained(seed: int, *, upside_down: bool = False) -> Training:
    """A predictor of the world, or one that was trained on inverted labels."""
    outcomes = make_world(800, seed=seed)
    if upside_down:
        outcomes = [
            replace(o, signals=tuple(replace(s, value=1.0 - s.value) for s in o.signals))
            for o in outcomes
        ]
    return train(outcomes, (CODER, TALKER), seed=0, holdout_ratio=0.25, clock=lambda: 0.0)


GOOD, BETTER, BAD = trained(1), trained(2), trained(3, upside_down=True)


def blob(training: Training) -> bytes:
    return training.artifact.to_bytes()


def version(training: Training) -> str:
    return training.artifact.version


def predictor(training: Training) -> LightGBMPredictor:
    return LightGBMPredictor(training.artifact, MetadataPrior())


async def at_once(call: Callable[[], Any]) -> Any:
    return call()


class PromotionWorld:
    """Promotions on one folder and store, one after another, and what they published."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock(1000.0)
        self.store = OutcomeStore(f"sqlite:///{folder / 'outcomes.sqlite'}")
        self.published: dict[Topic, Any] = {}

    def start(self, shipped_dir: str = "", **learning: Any) -> Promotion:
        self.published.clear()
        return Promotion(
            Learning(**{"shadow_requests": 0, **learning}),
            shipped_dir,
            self.folder,
            store=self.store,
            publish=self.published.__setitem__,
            in_thread=at_once,
            clock=self.clock,
        )

    async def log(self, promotion: Promotion, outcomes: list[Outcome]) -> None:
        self.store.append(outcomes)
        await promotion.observe(outcomes)
        self.clock.advance(5.0)
        await promotion.tick()

    @property
    def champion(self) -> str:
        """Version of the published champion."""
        return str(self.published[Topic.PREDICTOR].version)

    @property
    def challenger(self) -> str:
        """Version of the published challenger, "" for none."""
        found = self.published[Topic.CHALLENGER]
        return "" if found is None else str(found.version)

    @property
    def status(self) -> PredictorStatus:
        """The published status of all predictors."""
        found: PredictorStatus = self.published[Topic.PREDICTORS]
        return found


def shadowed(count: int, present: Training, challenger: Training, **more: Any) -> list[Outcome]:
    """Outcomes of a router in which `present` decides and `challenger` decides in the shadow."""
    clock = FakeClock()
    shadow = Shadow(clock)
    shadow.challenger = predictor(challenger)
    outcomes = serve(count, GOALS, predictor(present), **more)
    compared = []
    for outcome in outcomes:
        clock.advance(1.0)
        compared.append(change_outcome(outcome, shadow=shadow.compare(outcome)))
    return compared
