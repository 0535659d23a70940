"""How routers and SLMs talk to the knowledge actor, and how they go on without it.

Nothing here is on the hot path: decisions use what was last heard.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from calm_serve.config import Fleet, Goals, Learning, ResidencyOptions, SLMSpec
from calm_serve.errors import CalmError, KnowledgeError, RequestError
from calm_serve.learning import Shadow
from calm_serve.prediction import Artifact, LightGBMPredictor, MetadataPrior
from calm_serve.prediction.cold_start import with_cold_start
from calm_serve.routing import ModelSelector
from calm_serve.types import Outcome, QualitySignal
from deployments.knowledge.actor import get_knowledge
from deployments.router.fleet_view import FleetView
from deployments.router.handles import Handles

log = logging.getLogger("ray.serve")

POLL_S = 30.0
RETRY_S = 1.0
CALL_TIMEOUT_S = 10.0
ECHO_TIMEOUT_S = 2.0  # for this router to hear of its own change


class KnowledgeClient:
    """A router's connection to the knowledge actor; creates the actor when it is missing."""

    def __init__(self, app_name: str, learning: Learning, fleet: Fleet) -> None:
        self._app_name, self._learning, self._base = app_name, learning, fleet
        self._actor: ActorHandle | None = None
        self.predictor_source = "metadata priors"
        self.reachable = False
        self.shadow = Shadow(time.monotonic)
        self._champion: Mapping[str, Any] | None = None  # as published
        self._newcomers: Mapping[str, Any] | None = None  # what stands in for its prior
        self.models: dict[str, Any] = {}  # as Promotion.summary; {} before it was heard
        self.goals_change: dict[str, Any] = {}  # the GoalChange in force; {} before the first
        self._goals_heard = asyncio.Event()
        self._heard: dict[str, int] = {}  # board key -> version

    async def log(self, rows: Sequence[Outcome]) -> None:
        """Return once the rows are durable; raise otherwise."""
        await asyncio.wait_for(self._call("log", uuid.uuid4().hex, list(rows)), CALL_TIMEOUT_S)

    async def feedback(self, outcome_id: str, signals: tuple[QualitySignal, ...]) -> None:
        """Store quality signals durably. Raises KnowledgeError when the actor does not answer."""
        await self._ask("feedback", outcome_id, signals)

    async def outcome(self, outcome_id: str) -> dict[str, Any] | None:
        """A stored outcome, None when there is none. Raises KnowledgeError."""
        found: Outcome | None = await self._ask("outcome", outcome_id)
        return None if found is None else asdict(found)

    async def want(self, router_id: str, said: Mapping[str, Any]) -> Mapping[str, Any]:
        """Report demand; see ResidencyCoordinator.want. Raises KnowledgeError."""
        told: Mapping[str, Any] = await self._ask("want", router_id, said)
        return told

    async def set_residency(
        self, options: ResidencyOptions, latency_per_s: float, energy_per_j: float
    ) -> None:
        """Change residency for all routers and replicas. Raises KnowledgeError."""
        await self._ask("configure_residency", options, latency_per_s, energy_per_j)

    async def set_goals(self, goals: Goals, by: str) -> dict[str, Any]:
        """Change the goals for all routers; return the durable change. Raises KnowledgeError.

        It comes back to this router on the board like to all others, in the actor's order; this
        waits for that, so that the caller sees it.
        """
        change = asdict(await self._ask("set_goals", goals, by))
        with suppress(TimeoutError):
            async with asyncio.timeout(ECHO_TIMEOUT_S):
                while self.goals_change.get("revision", 0) < change["revision"]:
                    await self._goals_heard.wait()
        return change

    async def goal_history(self, limit: int) -> list[dict[str, Any]]:
        """Who changed the goals when, newest first. Raises KnowledgeError."""
        history: list[dict[str, Any]] = await self._ask("goal_history", limit)
        return history

    async def predictors(self) -> dict[str, Any]:
        """Stored predictors and their states. Raises KnowledgeError."""
        found: dict[str, Any] = await self._ask("predictors")
        return found

    async def change_predictor(self, action: str, version: str) -> dict[str, Any]:
        """Pin, unpin or roll back. Raises RequestError for what cannot be done, KnowledgeError."""
        found: dict[str, Any] = await self._ask("change_predictor", action, version)
        return found

    async def follow(self, loop: ModelSelector, view: FleetView, handles: Handles) -> None:
        """Long-poll the board for ever: predictor, start-up states, SLMs added later."""
        have = self._heard
        while True:
            try:
                news = await self._call("board", have, POLL_S)
                self.reachable = True
            except (RayActorError, RayTaskError, ValueError) as error:
                self.reachable, self._actor = False, None
                log.warning("knowledge actor does not answer: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            for key, entry in news.items():
                have[key] = entry["version"]
                await self._apply(key, entry["value"], loop, view, handles)

    async def _apply(
        self, key: str, value: Any, loop: ModelSelector, view: FleetView, handles: Handles
    ) -> None:
        if key == "predictor":
            self._champion = value
            await self._apply_predictor(loop)
        elif key == "newcomers":
            self._newcomers = value
            await self._apply_predictor(loop)
        elif key == "challenger":
            self.shadow.challenger = await _predictor_of(value)
        elif key == "models":
            self.models = dict(value)
        elif key == "states":
            view.set_reports(value)
        elif key == "residency":
            view.set_desired_residency(value, self._heard[key])
        elif key == "watch":
            view.set_watch(value)
        elif key == "energy":
            view.watch.set_energy(value)
        elif key == "registry":
            apply_registry(value, self._base, loop, view, handles)
        elif key == "goals":
            self.apply_goals(value, loop)

    def apply_goals(self, change: Mapping[str, Any], loop: ModelSelector) -> None:
        """Swap the router's goals; the ones that it has already keep their controller's place."""
        try:
            goals = Goals.model_validate(change["new"])
            if goals != loop.goals:
                loop.set_goals(goals)
        except (ValidationError, CalmError) as error:
            log.error("published goals refused, the present ones stay: %s", error)
            return
        self.goals_change = dict(change)
        self._goals_heard.set()
        self._goals_heard = asyncio.Event()

    async def _apply_predictor(self, loop: ModelSelector) -> None:
        value = self._champion
        if value is None:
            loop.predictor, self.predictor_source = MetadataPrior(), "metadata priors"
            return
        predictor = await _predictor_of(value, self._newcomers)
        if predictor is None:
            return
        if value["source"] == "shipped":
            predictor.version += "+shipped"  # decisions say that nothing was learned here yet
        loop.predictor, self.predictor_source = predictor, value["source"]

    async def _call(self, method: str, *args: Any) -> Any:
        if self._actor is None:
            self._actor = await get_knowledge(self._app_name, self._base, self._learning)
        return await getattr(self._actor, method).remote(*args)

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            return await asyncio.wait_for(self._call(method, *args), CALL_TIMEOUT_S)
        except (RayActorError, RayTaskError, TimeoutError, ValueError) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RequestError):  # it did answer: no
                raise cause from None
            raise KnowledgeError(f"the knowledge actor does not answer: {error}") from error


async def _predictor_of(
    value: Mapping[str, Any] | None, newcomers: Mapping[str, Any] | None = None
) -> LightGBMPredictor | None:
    """Build a published predictor; None for none, and for one that this version cannot read."""
    if value is None:
        return None

    def build() -> LightGBMPredictor:
        new = None if newcomers is None else Artifact.from_bytes(newcomers["blob"])
        return with_cold_start(Artifact.from_bytes(value["blob"]), new, MetadataPrior())

    try:
        # Built off the loop: parsing trees takes milliseconds.
        return await asyncio.to_thread(build)
    except KnowledgeError as error:
        log.error("published predictor refused, the present one stays: %s", error)
        return None


def apply_registry(
    registry: Mapping[str, Mapping[str, Any]],
    base: Fleet,
    loop: ModelSelector,
    view: FleetView,
    handles: Handles,
) -> None:
    """Extend the configured fleet by SLMs that run in applications of their own."""
    known = {s.id for s in base.slms}
    added: dict[str, str] = {}
    specs: list[SLMSpec] = []
    for slm_id, entry in sorted(registry.items()):
        if slm_id in known:
            log.error("SLM %r of another application ignored: the fleet has that id", slm_id)
            continue
        try:
            specs.append(SLMSpec.model_validate(entry["spec"]))
        except (ValueError, CalmError) as error:
            log.error("SLM %r ignored: %s", slm_id, error)
            continue
        added[slm_id] = entry["app_name"]
    handles.set_added(added)
    fleet = base.model_copy(update={"slms": (*base.slms, *specs)})
    view.set_fleet(fleet)
    loop.set_fleet(fleet)
