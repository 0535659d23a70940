"""Learner: the learning parts of the knowledge actor, fed with the same outcomes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from calm_serve.config import Fleet, Learning, SLMSpec
from calm_serve.knowledge.background import take_steps
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.learning import (
    ColdStartTrainer,
    OutcomeMonitor,
    Promotion,
    RetrainingScheduler,
    RetrainJob,
    RetrainResult,
)
from calm_serve.protocol.topics import Topic
from calm_serve.types import Outcome, QualitySignal

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


class Learner:
    """Monitor, cold-start trainer, promotion and retraining of one application.

    Used from one event loop. `publish` takes a topic and its record; `in_thread` runs calls that
    block on the store or the disk; `joined` returns the SLMs that are not in the fleet file;
    `clock` returns Unix seconds and `monotonic` seconds that never go back.
    """

    def __init__(
        self,
        fleet: Fleet,
        learning: Learning,
        state_dir: Path,
        *,
        store: OutcomeStore,
        store_url: str,
        publish: Callable[[Topic, Any], None],
        in_thread: InThread,
        trainer: Callable[[RetrainJob], Awaitable[RetrainResult]],
        joined: Callable[[], tuple[SLMSpec, ...]],
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        """Load the champion of an earlier run (blocks; once). Raises KnowledgeError."""
        self._fleet, self._joined = fleet, joined
        self.promotion = Promotion(
            learning,
            fleet.predictor,
            state_dir,
            store=store,
            publish=publish,
            in_thread=in_thread,
            clock=clock,
        )
        self.retraining = RetrainingScheduler(
            store, store_url, self.promotion, trainer, in_thread, self._slm_ids, learning
        )
        self._monitor = OutcomeMonitor(
            clock, monotonic, partial(publish, Topic.MONITOR), self.retraining.on_drift
        )
        self._cold_start = ColdStartTrainer(partial(publish, Topic.COLD_START), clock)
        self.follow_slms()

    async def configure(self, fleet: Fleet, learning: Learning) -> None:
        """Take over the settings of a redeployment."""
        self._fleet = fleet
        self.promotion.learning = self.retraining.learning = learning
        self.follow_slms()
        await self.promotion.ship(fleet.predictor)

    def follow_slms(self) -> None:
        """Follow SLMs that joined or left."""
        self._monitor.set_slms((*self._fleet.slms, *self._joined()))

    async def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Learn from outcomes that are stored; a part that fails is logged."""
        await take_steps(
            lambda: self._monitor.observe(outcomes),
            lambda: self._cold_start.observe(outcomes),
            self._fit_cold_start,
            lambda: self.promotion.observe(outcomes),
            self.retraining.start_if_due,
        )

    async def feedback(self, outcome_id: str, signals: Sequence[QualitySignal]) -> None:
        """Learn from signals that are stored."""
        await take_steps(
            lambda: self._monitor.feedback(outcome_id, signals),
            lambda: self._cold_start.feedback(outcome_id, signals),
            self._fit_cold_start,
            self.retraining.start_if_due,
        )

    async def tick(self) -> None:
        """Background work that is due."""
        await take_steps(self._monitor.tick, self._fit_cold_start, self.promotion.tick)

    def predictors(self) -> dict[str, Any]:
        """Document of GET /v1/predictors: stored predictors, their status, the last training."""
        return {**self.promotion.document(), "last_training": self.retraining.last_verdict}

    def status(self) -> dict[str, Any]:
        """Champion and last training, for display."""
        champion = self.promotion.champion
        return {
            "predictor": champion.artifact.version if champion else "prior",
            "predictor_source": champion.source if champion else "prior",
            "predictor_metrics": dict(champion.artifact.metrics) if champion else {},
            "retraining": self.retraining.running,
            "last_verdict": self.retraining.last_verdict,
            "predictors": self.promotion.summary(),
        }

    def _slm_ids(self) -> tuple[str, ...]:
        return tuple(s.id for s in (*self._fleet.slms, *self._joined()))

    async def _fit_cold_start(self) -> None:
        champion = self.promotion.champion
        artifact = champion.artifact if champion else None
        await self._cold_start.fit_if_due(self._fleet, self._joined(), artifact)
