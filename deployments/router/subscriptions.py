"""Subscriptions: applies the knowledge actor's topics to this router."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from pydantic import ValidationError

from calm_serve.config import Fleet, Goals, SLMSpec
from calm_serve.errors import CalmError, KnowledgeError
from calm_serve.learning import Shadow
from calm_serve.prediction import (
    Artifact,
    LightGBMPredictor,
    MetadataPrior,
    Predictor,
    with_cold_start,
)
from calm_serve.protocol.topics import (
    GoalChange,
    PredictorStatus,
    PublishedPredictor,
    RegisteredSLM,
    Topic,
    Update,
    decode,
)
from calm_serve.requests import load_detector, needs_detector
from calm_serve.routing import ModelSelector
from deployments.router.fleet_view import FleetView
from deployments.router.handles import Handles

log = logging.getLogger("ray.serve")

PRIOR_SOURCE = "metadata priors"


class Subscriptions:
    """Applies topics to one router. Single-threaded; `base` is the configured fleet."""

    def __init__(
        self, base: Fleet, selector: ModelSelector, view: FleetView, handles: Handles
    ) -> None:
        self._base, self._selector, self._view, self._handles = base, selector, view, handles
        self.shadow = Shadow(time.monotonic)
        self.predictor_source = PRIOR_SOURCE
        self.predictors: PredictorStatus | None = None  # None before the first update
        self.goals_change: GoalChange | None = None  # the one in force
        self._goals_applied = asyncio.Event()
        self._champion: PublishedPredictor | None = None
        self._cold_start: PublishedPredictor | None = None

    async def apply(self, topic: str, update: Update) -> None:
        """Apply one update; an unreadable one is logged and changes nothing."""
        try:
            record = decode(topic, update)
        except KnowledgeError as error:
            log.error("update of %s refused, the current state stays: %s", topic, error)
            return
        match Topic(topic):
            case Topic.PREDICTOR:
                self._champion = record
                await self._apply_predictor()
            case Topic.COLD_START:
                self._cold_start = record
                await self._apply_predictor()
            case Topic.CHALLENGER:
                self.shadow.challenger = await _predictor_of(record)
            case Topic.PREDICTORS:
                self.predictors = record
            case Topic.REPLICAS:
                self._view.set_reports(record)
            case Topic.RESIDENCY:
                self._view.set_desired_residency(record, update.revision)
            case Topic.MONITOR:
                self._view.set_findings(record)
            case Topic.ENERGY:
                self._view.monitor.set_energy(record)
            case Topic.SLMS:
                await self._apply_registry(record)
            case Topic.GOALS:
                self.apply_goals(record)

    def apply_goals(self, change: GoalChange) -> None:
        """Replace the router's goals; with equal goals the controller keeps its state."""
        try:
            goals = Goals.model_validate(change.new)
            if goals != self._selector.goals:
                self._selector.set_goals(goals)
        except (ValidationError, CalmError) as error:
            log.error("published goals refused, the current ones stay: %s", error)
            return
        self.goals_change = change
        self._goals_applied.set()
        self._goals_applied = asyncio.Event()

    async def wait_for_goals(self, revision: int, timeout_s: float) -> bool:
        """Wait for goals of at least this revision; return whether they arrived in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._has_goals(revision):
                    await self._goals_applied.wait()
        return self._has_goals(revision)

    def _has_goals(self, revision: int) -> bool:
        return self.goals_change is not None and self.goals_change.revision >= revision

    async def _apply_predictor(self) -> None:
        published = self._champion
        if published is None:
            self._swap(MetadataPrior(), PRIOR_SOURCE)
            return
        predictor = await _predictor_of(published, self._cold_start)
        if predictor is None:
            return
        shipped = published.source == "shipped"
        predictor.version = replace(predictor.version, shipped=shipped)
        self._swap(predictor, published.source)

    def _swap(self, predictor: Predictor, source: str) -> None:
        self._selector.predictor, self.predictor_source = predictor, source
        self._view.set_predictor(predictor.version)

    async def _apply_registry(self, registry: Mapping[str, RegisteredSLM]) -> None:
        """Extend the configured fleet by SLMs that run in applications of their own."""
        known = {s.id for s in self._base.slms}
        added: dict[str, str] = {}
        specs: list[SLMSpec] = []
        for slm_id, entry in sorted(registry.items()):
            if slm_id in known:
                log.error("SLM %r of another application ignored: the fleet has that id", slm_id)
                continue
            try:
                specs.append(SLMSpec.model_validate(entry.spec))
            except (ValueError, CalmError) as error:
                log.error("SLM %r ignored: %s", slm_id, error)
                continue
            added[slm_id] = entry.app_name
        self._handles.set_added(added)
        fleet = self._base.model_copy(update={"slms": (*self._base.slms, *specs)})
        if needs_detector(fleet):
            await asyncio.to_thread(load_detector)
        self._view.set_fleet(fleet)
        self._selector.set_fleet(fleet)


async def _predictor_of(
    published: PublishedPredictor | None, cold_start: PublishedPredictor | None = None
) -> LightGBMPredictor | None:
    """Build a published predictor; None for none, and for an unreadable one, which is logged."""
    if published is None:
        return None

    def build() -> LightGBMPredictor:
        new = None if cold_start is None else Artifact.from_bytes(cold_start.blob)
        return with_cold_start(Artifact.from_bytes(published.blob), new, MetadataPrior())

    try:
        # Built off the event loop: parsing trees takes milliseconds.
        return await asyncio.to_thread(build)
    except KnowledgeError as error:
        log.error("published predictor refused, the current one stays: %s", error)
        return None
