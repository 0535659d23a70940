"""The knowledge actor: `KnowledgeService` as a detached, named Ray actor that outlives deploys."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import ray

from calm_serve.config import Fleet, Learning
from calm_serve.knowledge import KnowledgeService
from calm_serve.protocol.topics import GOAL_CHANGES, REGISTRATION, RegisteredSLM
from deployments.knowledge.address import NAMESPACE, actor_name

# Concurrent calls. Every router and SLM replica occupies one with its long poll.
MAX_CONCURRENCY = 1024


class KnowledgeActor(KnowledgeService):
    """A restarted actor resumes with the settings of the last `configure`."""

    def __init__(self, fleet: Fleet, learning: Learning) -> None:
        restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        super().__init__(fleet, learning, resume=restarted)

    async def register(self, spec_json: str, app_name: str) -> None:
        """As `register_slm`, for SLM applications of the former build: they outlive a redeploy."""
        record = RegisteredSLM(json.loads(spec_json), app_name)
        await self.register_slm(REGISTRATION.encode(record))

    async def goal_history(self, limit: int) -> list[dict[str, Any]]:
        """As `goal_changes`, for routers of the former build."""
        return [asdict(change) for change in GOAL_CHANGES.decode(await self.goal_changes(limit))]


def start_knowledge(app_name: str, fleet: Fleet, learning: Learning) -> Any:
    """Return the handle of the application's knowledge actor, creating the actor if need be.

    All methods of KnowledgeService are remote methods. The actor keeps its state on the node where
    it runs unless `learning` points to shared storage.
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
