"""Knowledge service: the knowledge actor without Ray. It logs outcomes, learns and publishes.

All methods run on one event loop and none blocks it: the store has a thread of its own, training a
child process. State that must survive a restart is in `state_dir` and the store. The records that
cross to other processes are in `calm_serve.protocol`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from calm_serve.config import Fleet, Goals, Learning, ResidencyOptions, SLMSpec
from calm_serve.errors import ConfigError, KnowledgeError, NewerRecordError
from calm_serve.knowledge.background import Ticker, take_steps
from calm_serve.knowledge.columns import decode_signals
from calm_serve.knowledge.energy_ledger import EnergyLedger
from calm_serve.knowledge.goal_history import GoalHistory
from calm_serve.knowledge.learner import Learner
from calm_serve.knowledge.publisher import Publisher
from calm_serve.knowledge.slm_registry import SLMRegistry, StartupStates
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.knowledge.training_process import retrain_in_child
from calm_serve.learning import RetrainJob, RetrainResult
from calm_serve.protocol.formats import RecordFormat
from calm_serve.protocol.outcomes import OUTCOME, SIGNALS, decode_batch
from calm_serve.protocol.reports import (
    DEMAND_REPLY,
    DEMAND_REPORT,
    ENERGY_REPORT,
    REPLICA_REPORT,
)
from calm_serve.protocol.topics import (
    FORMATS,
    GOAL_CHANGES,
    REGISTRATION,
    Topic,
    Update,
)
from calm_serve.residency import RESIDENCY_KEY, ResidencyCoordinator
from calm_serve.types import QualitySignal

TICK_S = 5.0  # between two runs of the background work
PRUNE_EVERY_TICKS = 12  # once a minute
MAX_WAIT_S = 60.0  # of one long poll
MAX_DETAIL_CHARS = 500  # of a replica's report; bounds the published topic
REGISTRY_KEY, SETTINGS_KEY = "registry", "settings"  # keys of `OutcomeStore.meta`

T = TypeVar("T")
_log = logging.getLogger(__name__)


class KnowledgeService:
    """Durable log, learning and published topics of one application."""

    def __init__(
        self,
        fleet: Fleet,
        learning: Learning,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        trainer: Callable[[RetrainJob], Awaitable[RetrainResult]] = retrain_in_child,
        resume: bool = False,
    ) -> None:
        """Open the store and load the champion (blocks; once). Raises KnowledgeError.

        `resume` takes the settings of the last `configure`, because Ray restarts an actor with the
        arguments of its first start.
        """
        self._clock = clock
        state_dir = Path(learning.state_dir).expanduser().resolve()
        state_dir.mkdir(parents=True, exist_ok=True)
        store_url = learning.store_url or f"sqlite:///{state_dir / 'outcomes.sqlite'}"
        self._store = OutcomeStore(store_url)
        if resume:
            fleet, learning = stored_settings(self._store) or (fleet, learning)
        self._fleet, self._learning = fleet, learning
        # One thread, so that writes happen in the order of their calls.
        self._io = ThreadPoolExecutor(1, thread_name_prefix="knowledge-store")
        self._ticker, self._ticks, self._refused_rows = Ticker(self.tick, TICK_S), 0, 0
        # Milliseconds since 1970: a restarted service never repeats a revision.
        self._publisher = Publisher(int(clock() * 1000))
        publish = self._publisher.publish
        self._registry, self._states = self._restored_registry(monotonic), StartupStates()
        publish(Topic.REPLICAS, {})
        to_routers = functools.partial(publish, Topic.GOALS)
        self._goals = GoalHistory(self._store, to_routers, self._in_thread, clock)
        to_all = functools.partial(publish, Topic.RESIDENCY)
        self._residency = ResidencyCoordinator(self._store, to_all, monotonic)
        self._energy = EnergyLedger(clock)
        self._learner = Learner(
            fleet,
            learning,
            state_dir,
            store=self._store,
            store_url=store_url,
            publish=publish,
            in_thread=self._in_thread,
            trainer=trainer,
            joined=self._registry.specs,
            clock=clock,
            monotonic=monotonic,
        )
        self._follow_slms()

    async def configure(self, fleet: Fleet, learning: Learning) -> None:
        """Take the settings of a redeployment.

        Raises ConfigError when they name another place for the log.
        """
        check_settings(self._learning, learning)
        await self._in_thread(lambda: store_settings(self._store, fleet, learning))
        self._fleet, self._learning = fleet, learning
        self._follow_slms()
        await self._learner.configure(fleet, learning)

    async def log(self, batch_id: str, batch: bytes) -> list[str]:
        """Store outcomes; return the ids that the caller may forget. Durable on return.

        `batch` is the result of `protocol.outcomes.encode_batch`; anything else, or a batch of a
        newer program, is a KnowledgeError. A malformed row can never be stored, so its id is
        returned too; it is counted and logged.
        """
        self._ticker.start()
        outcomes, refused = decode_batch(batch)
        for reason in refused.values():
            _log.warning("batch %s: %s", batch_id, reason)
        self._refused_rows += len(refused)
        added = await self._in_thread(lambda: self._store.append(outcomes))
        new = list({o.outcome_id: o for o in outcomes if o.outcome_id in added}.values())
        await self._learner.observe(new)
        return [*(o.outcome_id for o in outcomes), *refused]

    async def feedback(
        self, outcome_id: str, signals: Sequence[QualitySignal | Mapping[str, Any]]
    ) -> bool:
        """Store quality signals, also of an outcome that has not arrived yet.

        Returns whether the outcome is known. Raises KnowledgeError for a malformed signal.
        Routers of the former build call this, with plain data.
        """
        self._ticker.start()
        decoded = decode_signals(signals)
        known = await self._in_thread(lambda: self._store.add_signals(outcome_id, decoded))
        await self._learner.feedback(outcome_id, decoded)
        return known

    async def add_signals(self, outcome_id: str, signals: bytes) -> bool:
        """As `feedback`, from `protocol.outcomes.SIGNALS`."""
        return await self.feedback(outcome_id, SIGNALS.decode(signals))

    async def outcome(self, outcome_id: str) -> bytes | None:
        """A stored outcome with its signals, in the format `outcomes.OUTCOME`; None if unknown."""
        found = await self._in_thread(lambda: self._store.get(outcome_id))
        return None if found is None else OUTCOME.encode(found)

    async def follow(
        self, seen: Mapping[str, int], timeout_s: float, topics: Sequence[str] | None = None
    ) -> dict[str, Update]:
        """Long poll: updates (of `topics`) with revisions other than in `seen`, once there are any.

        Pass each update's revision back in `seen`. Empty after timeout_s (at most MAX_WAIT_S).
        """
        self._ticker.start()
        return await self._publisher.wait(seen, min(max(timeout_s, 0.0), MAX_WAIT_S), topics)

    async def configure_goals(self, goals: Goals) -> None:
        """Take the goals of a deployment; see `GoalHistory.configure`."""
        await self._goals.configure(goals)

    async def set_goals(self, goals: Goals, by: str) -> bytes:
        """Replace the goals; return the durable change, in the format of its topic."""
        return FORMATS[Topic.GOALS].encode(await self._goals.set(goals, by))

    async def goal_changes(self, limit: int) -> bytes:
        """Who changed the goals when, newest first, as `protocol.topics.GOAL_CHANGES`."""
        return GOAL_CHANGES.encode(await self._goals.history(limit))

    async def report_state(self, slm_id: str, replica_id: str, report: bytes) -> None:
        """Take a replica's report of its start-up, `protocol.reports.REPLICA_REPORT`."""
        found = REPLICA_REPORT.decode(report)
        found = replace(found, detail=found.detail[:MAX_DETAIL_CHARS], at=self._clock())
        self._states.report(slm_id, replica_id, found)
        self._residency.report(slm_id, replica_id, found.state, found.ready_s)
        self._publisher.publish(Topic.REPLICAS, self._states.snapshot())

    async def configure_residency(
        self, options: ResidencyOptions, latency_per_s: float, energy_per_j: float
    ) -> None:
        """Take residency settings and the goals' weights; durable when this returns."""
        text = self._residency.configure(options, latency_per_s, energy_per_j)
        await self._in_thread(lambda: self._store.set_meta(RESIDENCY_KEY, text))

    async def report_demand(self, router_id: str, report: bytes) -> bytes:
        """Take a router's demand for SLMs, `protocol.reports.DEMAND_REPORT`; return the reply."""
        reply = self._residency.report_demand(router_id, DEMAND_REPORT.decode(report))
        return DEMAND_REPLY.encode(reply)

    async def report_energy(self, slm_id: str, replica_id: str, report: bytes) -> None:
        """Take a replica's energy, published at the next tick."""
        self._energy.report(slm_id, replica_id, ENERGY_REPORT.decode(report))

    async def register_slm(self, registration: bytes) -> None:
        """Add an SLM application, `protocol.topics.REGISTRATION`, or renew its heartbeat.

        Raises ConfigError for what cannot be registered, KnowledgeError for another record.
        """
        self._ticker.start()
        found, taken = REGISTRATION.decode(registration), [s.id for s in self._fleet.slms]
        if self._registry.register(found.spec, found.app_name, taken):
            await self._publish_registry()

    async def unregister(self, slm_id: str) -> None:
        """Remove an SLM application; an unknown id is ignored."""
        if self._registry.unregister(slm_id):
            await self._publish_registry()

    async def predictors(self) -> dict[str, Any]:
        """As `Learner.predictors`."""
        return self._learner.predictors()

    async def change_predictor(self, action: str, version: str = "") -> dict[str, Any]:
        """As `Promotion.act`; return `predictors()` afterwards."""
        self._ticker.start()
        await self._learner.promotion.act(action, version)
        return self._learner.predictors()

    async def retrain(self, force: bool = False) -> dict[str, Any]:
        """Train now, and offer the challenger if it passes the promotion test; return the verdict.

        Without `force`, fewer than min_outcomes labelled outcomes give the reason
        "too_few_outcomes". Waits for a training that is already running. Raises KnowledgeError.
        """
        return await self._learner.retraining.retrain(force)

    async def status(self) -> dict[str, Any]:
        """Counts, champion and last training, for display."""
        return {
            "outcomes": await self._in_thread(self._store.count),
            "labelled": await self._in_thread(self._store.labelled_count),
            "labelled_total": await self._in_thread(self._store.labelled_total),
            "refused_rows": self._refused_rows,
            **self._learner.status(),
            "registered": sorted(self._registry.ids()),
        }

    async def tick(self) -> None:
        """Background work that is due, such as dropping SLM applications without a heartbeat."""
        self._ticks += 1
        await take_steps(
            self._learner.tick, self._residency.step, self._publish_energy, self._expire
        )
        if self._ticks % PRUNE_EVERY_TICKS == 0:
            await take_steps(self.prune)

    async def prune(self) -> int:
        """Delete outcomes beyond `learning.max_rows`, oldest first; return how many."""
        return await self._in_thread(lambda: self._store.prune(self._learning.max_rows))

    async def close(self) -> None:
        """Stop background work, cancel a running training, and close the store."""
        await self._learner.retraining.close()
        await self._ticker.stop()
        await self._in_thread(self._store.close)
        self._io.shutdown()

    def _restored_registry(self, monotonic: Callable[[], float]) -> SLMRegistry:
        """The SLM applications of an earlier run, published until their heartbeats are missed."""
        registry = SLMRegistry(monotonic)
        if text := self._store.meta(REGISTRY_KEY):
            try:
                registry.restore(text)
            except KnowledgeError as error:  # heartbeats bring the SLMs back within seconds
                _log.error("stored %r ignored: %s", REGISTRY_KEY, error.message)
        self._publisher.publish(Topic.SLMS, registry.snapshot())
        return registry

    def _publish_energy(self) -> None:
        if (energy := self._energy.rows()) != (self._publisher.record(Topic.ENERGY) or {}):
            self._publisher.publish(Topic.ENERGY, energy)

    async def _expire(self) -> None:
        if self._registry.expire():
            await self._publish_registry()

    async def _publish_registry(self) -> None:
        self._publisher.publish(Topic.SLMS, self._registry.snapshot())
        self._follow_slms()
        text = self._registry.to_json()
        # Stored, so that after a restart the SLM applications need not wait for their heartbeats.
        await self._in_thread(lambda: self._store.set_meta(REGISTRY_KEY, text))

    def _follow_slms(self) -> None:
        slms: tuple[SLMSpec, ...] = (*self._fleet.slms, *self._registry.specs())
        self._residency.set_slms(slms)
        self._learner.follow_slms()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, call)


def check_settings(present: Learning, new: Learning) -> None:
    """Raise ConfigError when the new settings name another place for the log."""
    for name in ("store_url", "state_dir"):
        if getattr(new, name) != getattr(present, name):
            raise ConfigError(
                f"learning.{name} cannot change while the knowledge actor runs; shut it down"
            )


@dataclass(frozen=True, slots=True)
class StoredSettings:
    """Settings of the last `configure`, for an actor that Ray restarts."""

    fleet: Fleet
    learning: Learning


# The former build wrote version 1 without name and version in front.
SETTINGS: RecordFormat[StoredSettings] = RecordFormat("settings", 1, StoredSettings, bare=1)


def store_settings(store: OutcomeStore, fleet: Fleet, learning: Learning) -> None:
    """Store both; durable when this returns. Raises KnowledgeError."""
    store.set_meta(SETTINGS_KEY, SETTINGS.encode(StoredSettings(fleet, learning)).decode())


def stored_settings(store: OutcomeStore) -> tuple[Fleet, Learning] | None:
    """The stored settings; None for none, and for what this program cannot read, which is logged.

    They stay in the store until the next `configure`, which brings settings of its own.
    """
    text = store.meta(SETTINGS_KEY)
    if text is None:
        return None
    try:
        found = SETTINGS.decode(text)
    except NewerRecordError as error:
        _log.error("stored %r ignored: %s", SETTINGS_KEY, error.message)
        return None
    except KnowledgeError as error:
        _log.warning("stored %r ignored: %s", SETTINGS_KEY, error.message)
        return None
    return found.fleet, found.learning
