"""How routers and SLMs talk to the knowledge actor, and how they go on without it.

Nothing here is on the hot path: decisions use what was last heard.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from calm_serve.analyze.lightgbm import LightGBMPredictor
from calm_serve.analyze.prior import MetadataPrior
from calm_serve.config import Fleet, Learning, SLMSpec
from calm_serve.errors import CalmError, KnowledgeError
from calm_serve.loop import Loop
from calm_serve.types import Outcome, QualitySignal
from deployments.fleet_view import FleetView
from deployments.handles import Handles
from deployments.knowledge import NAMESPACE, actor_name, get_knowledge

log = logging.getLogger("ray.serve")

POLL_S = 30.0
RETRY_S = 1.0
CALL_TIMEOUT_S = 10.0


class KnowledgeClient:
    """A router's connection to the knowledge actor; creates the actor when it is missing."""

    def __init__(self, app_name: str, learning: Learning, fleet: Fleet) -> None:
        self._app_name, self._learning, self._base = app_name, learning, fleet
        self._actor: ActorHandle | None = None
        self.predictor_source = "metadata priors"
        self.reachable = False

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

    async def follow(self, loop: Loop, view: FleetView, handles: Handles) -> None:
        """Long-poll the board for ever: predictor, start-up states, SLMs added later."""
        have: dict[str, int] = {}
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
        self, key: str, value: Any, loop: Loop, view: FleetView, handles: Handles
    ) -> None:
        if key == "predictor":
            await self._apply_predictor(value, loop)
        elif key == "states":
            view.set_reports(value)
        elif key == "registry":
            apply_registry(value, self._base, loop, view, handles)

    async def _apply_predictor(self, value: Mapping[str, Any] | None, loop: Loop) -> None:
        if value is None:
            loop.predictor, self.predictor_source = MetadataPrior(), "metadata priors"
            return
        try:
            # Built off the loop: parsing trees takes milliseconds.
            predictor = await asyncio.to_thread(
                LightGBMPredictor.from_bytes, value["blob"], MetadataPrior()
            )
        except KnowledgeError as error:
            log.error("published predictor refused, the present one stays: %s", error)
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
            raise KnowledgeError(f"the knowledge actor does not answer: {error}") from error


def apply_registry(
    registry: Mapping[str, Mapping[str, Any]],
    base: Fleet,
    loop: Loop,
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


class StateReporter:
    """An SLM replica's way to say how its start goes; best effort, fire and forget."""

    def __init__(self, app_name: str, slm_id: str, replica_id: str) -> None:
        self._name = actor_name(app_name)
        self._slm_id = slm_id
        self._replica_id = replica_id

    def report(
        self, state: str, ready_s: Mapping[str, float] | None = None, detail: str = ""
    ) -> None:
        """Report a state; `ready_s` are the times of the phases so far, in seconds."""
        try:
            actor = ray.get_actor(self._name, namespace=NAMESPACE)
        except ValueError:
            return  # no knowledge actor: states are then visible in Serve's own status only
        times = dict(ready_s or {})
        actor.report_state.remote(self._slm_id, self._replica_id, state, times, detail)
