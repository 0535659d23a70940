"""The knowledge actor: `KnowledgeService` as a detached, named Ray actor that outlives deploys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray

from calm_serve.config import Fleet, Goals, Learning, ResidencyOptions
from calm_serve.protocol.topics import GOAL_CHANGES, REGISTRATION, RegisteredSLM, Update
from calm_serve.types import QualitySignal
from deployments.knowledge.address import NAMESPACE, actor_name

# Concurrent calls. Every router and SLM replica occupies one with its long poll.
MAX_CONCURRENCY = 1024


class KnowledgeActor:
    """The remote methods; each is that of `KnowledgeService`.

    Ray imports the class of an actor in every process that looks the actor up, SLM replicas
    included. So the service, with its database and LightGBM, is imported only where it runs.
    A restarted actor resumes with the settings of the last `configure`.
    """

    def __init__(self, fleet: Fleet, learning: Learning) -> None:
        from calm_serve.knowledge import KnowledgeService

        restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._service = KnowledgeService(fleet, learning, resume=restarted)

    async def configure(self, fleet: Fleet, learning: Learning) -> None:
        """Take the settings of a redeployment."""
        await self._service.configure(fleet, learning)

    async def log(self, batch_id: str, batch: bytes) -> list[str]:
        """Store outcomes."""
        return await self._service.log(batch_id, batch)

    async def feedback(
        self, outcome_id: str, signals: Sequence[QualitySignal | Mapping[str, Any]]
    ) -> bool:
        """As `add_signals`, for routers of the former build."""
        return await self._service.feedback(outcome_id, signals)

    async def add_signals(self, outcome_id: str, signals: bytes) -> bool:
        """Store quality signals."""
        return await self._service.add_signals(outcome_id, signals)

    async def outcome(self, outcome_id: str) -> bytes | None:
        """A stored outcome."""
        return await self._service.outcome(outcome_id)

    async def follow(
        self, seen: Mapping[str, int], timeout_s: float, topics: Sequence[str] | None = None
    ) -> dict[str, Update]:
        """Long poll of the published topics."""
        return await self._service.follow(seen, timeout_s, topics)

    async def configure_goals(self, goals: Goals) -> None:
        """Take the goals of a deployment."""
        await self._service.configure_goals(goals)

    async def set_goals(self, goals: Goals, by: str) -> bytes:
        """Replace the goals."""
        return await self._service.set_goals(goals, by)

    async def goal_changes(self, limit: int) -> bytes:
        """Who changed the goals when."""
        return await self._service.goal_changes(limit)

    async def goal_history(self, limit: int) -> list[dict[str, Any]]:
        """As `goal_changes`, for routers of the former build."""
        return [asdict(change) for change in GOAL_CHANGES.decode(await self.goal_changes(limit))]

    async def report_state(self, slm_id: str, replica_id: str, report: bytes) -> None:
        """Take a replica's report of its state."""
        await self._service.report_state(slm_id, replica_id, report)

    async def report_energy(self, slm_id: str, replica_id: str, report: bytes) -> None:
        """Take a replica's energy."""
        await self._service.report_energy(slm_id, replica_id, report)

    async def configure_residency(
        self, options: ResidencyOptions, latency_per_s: float, energy_per_j: float
    ) -> None:
        """Take residency settings."""
        await self._service.configure_residency(options, latency_per_s, energy_per_j)

    async def report_demand(self, router_id: str, report: bytes) -> bytes:
        """Take a router's demand for SLMs."""
        return await self._service.report_demand(router_id, report)

    async def register_slm(self, registration: bytes) -> None:
        """Add an SLM application, or renew its heartbeat."""
        await self._service.register_slm(registration)

    async def register(self, spec_json: str, app_name: str) -> None:
        """As `register_slm`, for SLM applications of the former build: they outlive a redeploy."""
        record = RegisteredSLM(json.loads(spec_json), app_name)
        await self.register_slm(REGISTRATION.encode(record))

    async def unregister(self, slm_id: str) -> None:
        """Remove an SLM application."""
        await self._service.unregister(slm_id)

    async def predictors(self) -> dict[str, Any]:
        """The stored predictors."""
        return await self._service.predictors()

    async def change_predictor(self, action: str, version: str = "") -> dict[str, Any]:
        """Pin, unpin or roll back a predictor."""
        return await self._service.change_predictor(action, version)

    async def retrain(self, force: bool = False) -> dict[str, Any]:
        """Train now."""
        return await self._service.retrain(force)

    async def status(self) -> dict[str, Any]:
        """Counts, champion and last training."""
        return await self._service.status()

    async def close(self) -> None:
        """Stop background work and close the store."""
        await self._service.close()


def start_knowledge(app_name: str, fleet: Fleet, learning: Learning) -> Any:
    """Return the handle of the application's knowledge actor, creating the actor if need be.

    The actor keeps its state on the node where it runs unless `learning` points to shared storage.
    """
    return (
        ray.remote(KnowledgeActor)
        .options(
            name=actor_name(app_name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            # A repeated call is harmless: outcomes have ids, and all other calls replace state.
            max_task_retries=3,
            max_concurrency=MAX_CONCURRENCY,
        )
        .remote(fleet, learning)
    )


async def get_knowledge(app_name: str, fleet: Fleet, learning: Learning) -> Any:
    """As `start_knowledge`, and pass the current settings to a running actor.

    Raises ConfigError, wrapped in a RayTaskError, when the new settings would move its log.
    """
    actor = start_knowledge(app_name, fleet, learning)
    await actor.configure.remote(fleet, learning)
    return actor
