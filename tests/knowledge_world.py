"""Knowledge services on one folder, with a clock that stands still and training in-process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calm_serve.config import Learning, SLMSpec
from calm_serve.knowledge.service import KnowledgeService
from calm_serve.knowledge.training_process import retrain_from_store
from calm_serve.learning.retraining import RetrainJob, RetrainResult
from calm_serve.protocol.outcomes import encode_batch
from calm_serve.protocol.topics import REGISTRATION, RegisteredSLM, Topic, decode
from calm_serve.types import Outcome
from tests.knowledge_data import make_fleet


@dataclass
class Clock:
    """Time that stands still until a test moves it."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """Services on one folder, with a clock and a trainer in this process."""

    folder: Path
    clock: Clock = field(default_factory=Clock)
    jobs: list[RetrainJob] = field(default_factory=list)
    training: asyncio.Event = field(default_factory=asyncio.Event)
    before_training: Callable[[], Any] = lambda: None
    services: list[KnowledgeService] = field(default_factory=list)

    def start(
        self, *, predictor: str = "", resume: bool = False, **learning: Any
    ) -> KnowledgeService:
        self.clock.now += 1.0
        values = {"state_dir": str(self.folder / "state"), "min_outcomes": 60, "retrain_every": 40}
        service = KnowledgeService(
            make_fleet(predictor=predictor),
            Learning(**{**values, **learning}),
            clock=self.clock,
            monotonic=self.clock,
            trainer=self._train,
            resume=resume,
        )
        self.services.append(service)
        return service

    async def _train(self, job: RetrainJob) -> RetrainResult:
        self.jobs.append(job)
        self.training.set()
        waiting = self.before_training()
        if waiting is not None:
            await waiting
        return retrain_from_store(job, self.clock)

    async def close(self) -> None:
        """Close every service that was started."""
        for service in self.services:
            await service.close()


async def settled(service: KnowledgeService) -> None:
    """Wait for a training that started by itself."""
    await service._learner.retraining.settled()


async def log(service: KnowledgeService, batch_id: str, rows: Sequence[Outcome]) -> list[str]:
    """Send outcomes as a router does; return the ids that are acknowledged."""
    return await service.log(batch_id, encode_batch(rows))


async def register(service: KnowledgeService, spec: SLMSpec, app_name: str) -> None:
    """Register an SLM as its application does."""
    record = RegisteredSLM(spec.model_dump(mode="json"), app_name)
    await service.register_slm(REGISTRATION.encode(record))


async def published(service: KnowledgeService, topic: Topic) -> Any:
    """The topic's newest record as a follower reads it, None before there was one."""
    update = (await service.follow({}, 0.0)).get(topic)
    return None if update is None else decode(topic, update)


async def revisions(service: KnowledgeService) -> dict[str, int]:
    """Topic -> revision of everything that is published now."""
    return {topic: update.revision for topic, update in (await service.follow({}, 0.0)).items()}
