"""Client: a router's connection to the knowledge actor.

Nothing here is on the hot path. While the actor does not answer, decisions use the topics that were
received last.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from calm_serve.config import Fleet, Goals, Learning, ResidencyOptions
from calm_serve.errors import KnowledgeError, RequestError
from calm_serve.protocol.outcomes import OUTCOME, SIGNALS, encode_batch
from calm_serve.protocol.reports import DEMAND_REPLY, DEMAND_REPORT, DemandReply, DemandReport
from calm_serve.protocol.topics import FORMATS, GOAL_CHANGES, GoalChange, Topic, Update
from calm_serve.types import Outcome, QualitySignal
from deployments.knowledge.actor import get_knowledge
from deployments.knowledge.address import OLDER_ACTOR

log = logging.getLogger("ray.serve")

POLL_S = 30.0  # of one long poll
RETRY_S = 1.0  # after a failed poll
CALL_TIMEOUT_S = 10.0

Apply = Callable[[str, Update], Awaitable[None]]


class KnowledgeClient:
    """Calls the actor, and creates it when it does not exist."""

    def __init__(self, app_name: str, learning: Learning, fleet: Fleet) -> None:
        self._app_name, self._learning, self._fleet = app_name, learning, fleet
        self._actor: ActorHandle | None = None
        self.reachable = False
        self._seen: dict[str, int] = {}  # topic -> revision

    async def log(self, rows: Sequence[Outcome]) -> None:
        """Return once the rows are durable; raise otherwise."""
        batch = encode_batch(rows)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await self._call("log", uuid.uuid4().hex, batch)

    async def feedback(self, outcome_id: str, signals: tuple[QualitySignal, ...]) -> None:
        """Store quality signals durably. Raises KnowledgeError when the actor does not answer."""
        await self._ask("add_signals", outcome_id, SIGNALS.encode(signals))

    async def outcome(self, outcome_id: str) -> Outcome | None:
        """A stored outcome, None when there is none. Raises KnowledgeError."""
        found: bytes | None = await self._ask("outcome", outcome_id)
        return None if found is None else OUTCOME.decode(found)

    async def report_demand(self, router_id: str, report: DemandReport) -> DemandReply:
        """Report this router's demand for SLMs. Raises KnowledgeError."""
        reply: bytes = await self._ask("report_demand", router_id, DEMAND_REPORT.encode(report))
        return DEMAND_REPLY.decode(reply)

    async def set_residency(
        self, options: ResidencyOptions, latency_per_s: float, energy_per_j: float
    ) -> None:
        """Change residency for all routers and replicas. Raises KnowledgeError."""
        await self._ask("configure_residency", options, latency_per_s, energy_per_j)

    async def set_goals(self, goals: Goals, by: str) -> GoalChange:
        """Change the goals for all routers; return the durable change. Raises KnowledgeError.

        This router receives the change like all others, as an update of its topic.
        """
        payload: bytes = await self._ask("set_goals", goals, by)
        change: GoalChange = FORMATS[Topic.GOALS].decode(payload)
        return change

    async def goal_changes(self, limit: int) -> tuple[GoalChange, ...]:
        """Changes of the goals, newest first. Raises KnowledgeError."""
        found: bytes = await self._ask("goal_changes", limit)
        return GOAL_CHANGES.decode(found)

    async def predictors(self) -> dict[str, Any]:
        """Stored predictors and their states. Raises KnowledgeError."""
        found: dict[str, Any] = await self._ask("predictors")
        return found

    async def change_predictor(self, action: str, version: str) -> dict[str, Any]:
        """Pin, unpin or roll back. Raises RequestError for an impossible action, KnowledgeError."""
        found: dict[str, Any] = await self._ask("change_predictor", action, version)
        return found

    async def follow(self, apply: Apply) -> None:
        """Long-poll all topics for ever, and pass each update to `apply`."""
        seen = self._seen
        while True:
            try:
                updates: dict[str, Update] = await self._call("follow", seen, POLL_S)
                self.reachable = True
            except (RayActorError, RayTaskError, ValueError) as error:
                self.reachable, self._actor = False, None
                log.warning("knowledge actor does not answer: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            except AttributeError:  # the actor was started by an older program
                self.reachable, self._actor = False, None
                log.error(OLDER_ACTOR)
                await asyncio.sleep(POLL_S)
                continue
            for topic, update in updates.items():
                seen[topic] = update.revision
                await apply(topic, update)

    async def _call(self, method: str, *args: Any) -> Any:
        if self._actor is None:
            self._actor = await get_knowledge(self._app_name, self._fleet, self._learning)
        return await getattr(self._actor, method).remote(*args)

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self._call(method, *args)
        except (RayActorError, RayTaskError, TimeoutError, ValueError) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RequestError):  # the actor answered with an error
                raise cause from None
            raise KnowledgeError(f"the knowledge actor does not answer: {error}") from error
        except AttributeError as error:  # the actor has no such method
            raise KnowledgeError(OLDER_ACTOR) from error
