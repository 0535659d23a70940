"""What the knowledge actor does, without Ray: log, learn, publish, and tell everybody.

All methods run on one event loop and none blocks it: the store has a thread of its own, training a
process of its own. Everything that must survive a restart is in `state_dir` and the store.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from calm_serve.config import Fleet, Goals, Learning, ResidencyOptions
from calm_serve.errors import ConfigError, KnowledgeError
from calm_serve.knowledge.codec import decode_outcome, decode_signals
from calm_serve.knowledge.energy_ledger import EnergyLedger
from calm_serve.knowledge.goal_history import GoalChange, GoalHistory
from calm_serve.knowledge.publisher import Publisher
from calm_serve.knowledge.slm_registry import SLMRegistry, StartupStates
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.knowledge.training_process import retrain_in_child
from calm_serve.learning import (
    ColdStartTrainer,
    OutcomeMonitor,
    Promotion,
    RetrainingScheduler,
    RetrainJob,
    RetrainResult,
)
from calm_serve.residency import RESIDENCY_KEY as RESIDENCY
from calm_serve.residency import ResidencyCoordinator
from calm_serve.types import Outcome, QualitySignal

TICK_S = 5.0
MAX_WAIT_S = 60.0
PRUNE_EVERY_TICKS = 12

Row = Outcome | Mapping[str, Any]
T = TypeVar("T")
_log = logging.getLogger(__name__)


class KnowledgeService:
    """Durable log, champion and bulletin board of one application."""

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

        `resume` goes on with the settings of the last `configure`: whoever restarts an actor has
        the arguments of its first start only.
        """
        self._clock = clock
        self._state_dir = Path(learning.state_dir).expanduser().resolve()
        self._state_dir.mkdir(parents=True, exist_ok=True)
        default_url = f"sqlite:///{self._state_dir / 'outcomes.sqlite'}"
        self._store_url = learning.store_url or default_url
        self._store = OutcomeStore(self._store_url)
        if resume:
            fleet, learning = kept(self._store) or (fleet, learning)
        self._fleet, self._learning = fleet, learning
        # One thread, so writes come one after another in the order they were asked for.
        self._io = ThreadPoolExecutor(1, thread_name_prefix="knowledge-store")
        self._roster, self._states = SLMRegistry(monotonic), StartupStates()
        self._ticker, self._ticks = Ticker(self.tick, TICK_S), 0
        self._refused_rows = 0
        # Milliseconds since 1970: a restarted service never repeats a version.
        self._board = Publisher(int(clock() * 1000))
        if registry := self._store.meta("registry"):
            self._roster.restore(registry)
        self._board.publish("registry", self._roster.snapshot())
        self._board.publish("states", {})
        to_goals = functools.partial(self._board.publish, "goals")
        self._goals = GoalHistory(self._store, to_goals, self._in_thread, clock)
        self._promotion = Promotion(
            learning,
            fleet.predictor,
            self._state_dir,
            store=self._store,
            publish=self._board.publish,
            in_thread=self._in_thread,
            clock=clock,
        )
        self._training = RetrainingScheduler(
            self._store,
            self._store_url,
            self._promotion,
            trainer,
            self._in_thread,
            self._slm_ids,
            learning,
        )
        to_followers = functools.partial(self._board.publish, RESIDENCY)
        self._residency = ResidencyCoordinator(self._store, to_followers, monotonic)
        self._energy = EnergyLedger(clock)
        to_routers = functools.partial(self._board.publish, "watch")
        self._watch = OutcomeMonitor(clock, monotonic, to_routers, self._training.on_drift)
        self._follow_slms()
        self._newcomers = ColdStartTrainer(
            functools.partial(self._board.publish, "newcomers"), clock
        )

    async def configure(self, fleet: Fleet, learning: Learning) -> None:
        """Take over the settings of a redeployment; where the log lives cannot change.

        Raises ConfigError when it would.
        """
        check(self._learning, learning)
        await self._in_thread(lambda: keep(self._store, fleet, learning))
        self._fleet, self._learning = fleet, learning
        self._promotion.learning = self._training.learning = learning
        self._follow_slms()
        await self._promotion.ship(fleet.predictor)

    async def log(self, batch_id: str, rows: Sequence[Row]) -> list[str]:
        """Store outcomes; return the ids that need not be sent again, durable when this returns.

        A malformed row can never be stored, so its id is acknowledged too, counted and logged.
        """
        self._ticker.start()
        outcomes: list[Outcome] = []
        refused: list[str] = []
        for row in rows:
            try:
                outcomes.append(decode_outcome(row))
            except KnowledgeError as error:
                _log.warning("batch %s: %s", batch_id, error.message)
                given = row.get("outcome_id") if isinstance(row, Mapping) else row.outcome_id
                refused.append(str(given))
        self._refused_rows += len(refused)
        added = await self._in_thread(lambda: self._store.append(outcomes))
        new = list({o.outcome_id: o for o in outcomes if o.outcome_id in added}.values())
        await take_steps(
            lambda: self._watch.observe(new),
            lambda: self._newcomers.observe(new),
            self._teach_newcomers,
            lambda: self._promotion.observe(new),
            self._training.maybe,
        )
        return [o.outcome_id for o in outcomes] + refused

    async def feedback(
        self, outcome_id: str, signals: Sequence[QualitySignal | Mapping[str, Any]]
    ) -> bool:
        """Store quality signals; they wait for an outcome that has not arrived yet.

        Returns whether the outcome is known. Raises KnowledgeError for a malformed signal.
        """
        self._ticker.start()
        decoded = decode_signals(signals)
        known = await self._in_thread(lambda: self._store.add_signals(outcome_id, decoded))
        await take_steps(
            lambda: self._watch.feedback(outcome_id, decoded),
            lambda: self._newcomers.feedback(outcome_id, decoded),
            self._teach_newcomers,
            self._training.maybe,
        )
        return known

    async def outcome(self, outcome_id: str) -> Outcome | None:
        """The stored outcome with its signals, None when there is none."""
        return await self._in_thread(lambda: self._store.get(outcome_id))

    async def board(
        self, have: Mapping[str, int], timeout_s: float, keys: Sequence[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Long-poll: entries (of `keys`) that differ from `have`, as soon as there are any.

        Keys: "predictor" and "challenger" {"blob", "version", "source"}; "models" as
        `Promotion.summary`; "states" SLM -> replica -> report;
        "newcomers" {"blob", "version"} or None;
        "registry" SLM -> {"spec", "app_name"}; "goals" a GoalChange's fields; "residency"
        {"tiers", "options"}, once there has been a memory budget. Each comes as
        {"version": int, "value": ...}; pass the versions back as `have`. Empty after timeout_s (at
        most MAX_WAIT_S).
        """
        self._ticker.start()
        return await self._board.wait(have, min(max(timeout_s, 0.0), MAX_WAIT_S), keys)

    async def configure_goals(self, goals: Goals) -> None:
        """Take a deployment's goals, unless they are those of the last one; see GoalHistory."""
        await self._goals.configure(goals)

    async def set_goals(self, goals: Goals, by: str) -> GoalChange:
        """Replace the goals; durable when this returns."""
        return await self._goals.set(goals, by)

    async def goal_history(self, limit: int) -> list[dict[str, Any]]:
        """Who changed the goals when, newest first."""
        return await self._goals.history(limit)

    async def report_state(
        self, slm_id: str, replica_id: str, state: str, ready_s: Mapping[str, float], detail: str
    ) -> None:
        """A replica says where its start-up is: seconds by phase so far, `detail` for people."""
        times = {k: float(v) for k, v in ready_s.items()}
        report = {"state": state, "ready_s": times, "detail": detail[:500], "at": self._clock()}
        self._states.report(slm_id, replica_id, report)
        self._residency.report(slm_id, replica_id, state, times)
        self._board.publish("states", self._states.snapshot())

    async def configure_residency(
        self, options: ResidencyOptions, latency_per_s: float, energy_per_j: float
    ) -> None:
        """Take residency settings and the goals' weights; durable when this returns."""
        text = self._residency.configure(options, latency_per_s, energy_per_j)
        await self._in_thread(lambda: self._store.set_meta(RESIDENCY, text))

    async def want(self, router_id: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """A router's demand for SLMs; see `ResidencyCoordinator.want`."""
        return self._residency.want(router_id, said)

    async def report_energy(self, slm_id: str, replica_id: str, report: Mapping[str, Any]) -> None:
        """A replica's energy books, published with the next tick; see `EnergyLedger`."""
        self._energy.report(slm_id, replica_id, report)

    async def register(self, spec_json: str, app_name: str) -> None:
        """Add an SLM application, or renew its heartbeat. Raises ConfigError."""
        self._ticker.start()
        if self._roster.register(spec_json, app_name, [s.id for s in self._fleet.slms]):
            await self._publish_registry()

    async def unregister(self, slm_id: str) -> None:
        """Remove an SLM application; unknown ids are fine."""
        if self._roster.unregister(slm_id):
            await self._publish_registry()

    async def predictors(self) -> dict[str, Any]:
        """Stored predictors, what is known of champion and challenger, the last training."""
        return {**self._promotion.document(), "last_training": self._training.last_verdict}

    async def change_predictor(self, action: str, version: str = "") -> dict[str, Any]:
        """As `Promotion.act`; return `predictors()` afterwards."""
        self._ticker.start()
        await self._promotion.act(action, version)
        return await self.predictors()

    async def retrain(self, force: bool = False) -> dict[str, Any]:
        """Train and promotion_test now, and publish a better predictor; return the verdict.

        Without `force`, fewer than min_outcomes labelled outcomes give the reason
        "too_few_outcomes". Joins a training that is running. Raises KnowledgeError.
        """
        return await self._training.retrain(force)

    async def status(self) -> dict[str, Any]:
        """Counts, champion and last verdict, for people."""
        champion = self._promotion.champion
        return {
            "outcomes": await self._in_thread(self._store.count),
            "labelled": await self._in_thread(self._store.labelled_count),
            "labelled_total": await self._in_thread(self._store.labelled_total),
            "refused_rows": self._refused_rows,
            "predictor": champion.artifact.version if champion else "prior",
            "predictor_source": champion.source if champion else "prior",
            "predictor_metrics": dict(champion.artifact.metrics) if champion else {},
            "retraining": self._training.running,
            "last_verdict": self._training.last_verdict,
            "models": self._promotion.summary(),
            "registered": sorted(self._roster.ids()),
        }

    async def tick(self) -> None:
        """Background work that is due: drop SLM applications whose heartbeat stopped, and so on."""
        self._ticks += 1
        await take_steps(
            self._watch.tick,
            self._teach_newcomers,
            self._residency.step,
            self._promotion.tick,
            self._publish_energy,
            self._expire,
        )
        if self._ticks % PRUNE_EVERY_TICKS == 0:
            await take_steps(self.prune)

    async def prune(self) -> int:
        """Delete outcomes beyond `learning.max_rows`, oldest first; return how many."""
        return await self._in_thread(lambda: self._store.prune(self._learning.max_rows))

    async def close(self) -> None:
        """Stop background work and close the store; a running training is ended."""
        await self._training.close()
        await self._ticker.stop()
        await self._in_thread(self._store.close)
        self._io.shutdown()

    def _slm_ids(self) -> tuple[str, ...]:
        return (*(s.id for s in self._fleet.slms), *self._roster.ids())

    async def _teach_newcomers(self) -> None:
        champion = self._promotion.champion
        artifact = champion.artifact if champion else None
        await self._newcomers.teach(self._fleet, self._roster.specs(), artifact)

    def _publish_energy(self) -> None:
        if (energy := self._energy.rows()) != (self._board.value("energy") or {}):
            self._board.publish("energy", energy)

    async def _expire(self) -> None:
        if self._roster.expire():
            await self._publish_registry()

    async def _publish_registry(self) -> None:
        registry = self._roster.snapshot()
        self._board.publish("registry", registry)
        self._follow_slms()
        # Kept, so that a restart does not take every SLM application off the air until it calls.
        await self._in_thread(lambda: self._store.set_meta("registry", json.dumps(registry)))

    def _follow_slms(self) -> None:
        slms = (*self._fleet.slms, *self._roster.specs())
        self._residency.set_slms(slms)
        self._watch.set_slms(slms)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, call)


async def take_steps(*steps: Callable[[], Any]) -> None:
    """Take every step, awaiting what can be awaited; one that fails is logged.

    What is durable already must not be asked for again because something was not learned from it,
    and no part may end the work of the others.
    """
    for step in steps:
        try:
            waiting = step()
            if inspect.isawaitable(waiting):
                await waiting
        except KnowledgeError as error:
            _log.warning("knowledge: %s", error.message)
        except Exception:  # noqa: BLE001  # whatever it is, the other steps go on
            _log.exception("a step of the knowledge service failed")


class Ticker:
    """Awaits `tick`, which does not raise, every `period_s` seconds once it is started."""

    def __init__(self, tick: Callable[[], Awaitable[None]], period_s: float) -> None:
        self._tick, self._period_s = tick, period_s
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Begin in the running event loop, at the first call: a constructor has none."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Return when the present tick is over and no other will come."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                await asyncio.wait_for(self._stopping.wait(), self._period_s)
            except TimeoutError:
                await self._tick()


SETTINGS_KEY = "settings"


def check(present: Learning, new: Learning) -> None:
    """Raise ConfigError when the log would have to move."""
    for name in ("store_url", "state_dir"):
        if getattr(new, name) != getattr(present, name):
            raise ConfigError(
                f"learning.{name} cannot change while the knowledge actor runs; shut it down"
            )


def keep(store: OutcomeStore, fleet: Fleet, learning: Learning) -> None:
    """Write both down; durable when this returns. Raises KnowledgeError."""
    data = {"fleet": fleet.model_dump(mode="json"), "learning": learning.model_dump(mode="json")}
    store.set_meta(SETTINGS_KEY, json.dumps(data))


def kept(store: OutcomeStore) -> tuple[Fleet, Learning] | None:
    """What was last written down, None when there is nothing that is still valid."""
    text = store.meta(SETTINGS_KEY)
    if text is None:
        return None
    try:
        data = json.loads(text)
        return Fleet.model_validate(data["fleet"]), Learning.model_validate(data["learning"])
    except ValidationError as error:
        _log.warning("stored settings passed over: %s", error)
        return None
