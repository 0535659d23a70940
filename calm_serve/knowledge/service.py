"""What the knowledge actor does, without Ray: log, learn, publish, and tell everybody.

All methods run on one event loop and none blocks it: the store has a thread of its own, training a
process of its own. Everything that must survive a restart is in `state_dir` and the store.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from calm_serve.analyze.lightgbm import Artifact
from calm_serve.config import Fleet, Learning
from calm_serve.errors import ConfigError, KnowledgeError
from calm_serve.knowledge.board import Board
from calm_serve.knowledge.champion import Champion, load_champion, save_champion
from calm_serve.knowledge.codec import decode_outcome, decode_signals
from calm_serve.knowledge.retrain import RetrainJob, RetrainResult, retrain_in_child
from calm_serve.knowledge.roster import Roster, StartupStates
from calm_serve.knowledge.store import OutcomeStore
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
    ) -> None:
        """Open the store and load the champion (blocks; once). Raises KnowledgeError."""
        self._fleet, self._learning = fleet, learning
        self._clock, self._trainer = clock, trainer
        self._state_dir = Path(learning.state_dir).expanduser().resolve()
        self._state_dir.mkdir(parents=True, exist_ok=True)
        default_url = f"sqlite:///{self._state_dir / 'outcomes.sqlite'}"
        self._store_url = learning.store_url or default_url
        self._store = OutcomeStore(self._store_url)
        # One thread, so writes come one after another in the order they were asked for.
        self._io = ThreadPoolExecutor(1, thread_name_prefix="knowledge-store")
        self._roster, self._states = Roster(monotonic), StartupStates()
        self._champion = load_champion(self._state_dir, fleet.predictor)
        self._retraining: asyncio.Task[dict[str, Any]] | None = None
        self._background: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._last_verdict: dict[str, Any] = {}
        self._refused_rows = 0
        # Milliseconds since 1970: a restarted service never repeats a version.
        self._board = Board(int(clock() * 1000))
        if registry := self._store.meta("registry"):
            self._roster.restore(registry)
        self._board.publish("registry", self._roster.snapshot())
        self._board.publish("states", {})
        if self._champion is not None:
            self._board.publish("predictor", _published(self._champion))

    async def configure(self, fleet: Fleet, learning: Learning) -> None:
        """Take over the settings of a redeployment; where the log lives cannot change.

        Raises ConfigError when it would.
        """
        for name in ("store_url", "state_dir"):
            if getattr(learning, name) != getattr(self._learning, name):
                raise ConfigError(
                    f"learning.{name} cannot change while the knowledge actor runs; shut it down"
                )
        self._fleet, self._learning = fleet, learning

    async def log(self, batch_id: str, rows: Sequence[Row]) -> list[str]:
        """Store outcomes; return the ids that need not be sent again, durable when this returns.

        A malformed row can never be stored, so its id is acknowledged too, counted and logged.
        """
        self._start()
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
        await self._in_thread(lambda: self._store.append(outcomes))
        await self._maybe_retrain()
        return [o.outcome_id for o in outcomes] + refused

    async def feedback(
        self, outcome_id: str, signals: Sequence[QualitySignal | Mapping[str, Any]]
    ) -> bool:
        """Store quality signals; they wait for an outcome that has not arrived yet.

        Returns whether the outcome is known. Raises KnowledgeError for a malformed signal.
        """
        self._start()
        decoded = decode_signals(signals)
        known = await self._in_thread(lambda: self._store.add_signals(outcome_id, decoded))
        await self._maybe_retrain()
        return known

    async def outcome(self, outcome_id: str) -> Outcome | None:
        """The stored outcome with its signals, None when there is none."""
        return await self._in_thread(lambda: self._store.get(outcome_id))

    async def board(self, have: Mapping[str, int], timeout_s: float) -> dict[str, dict[str, Any]]:
        """Long-poll: entries that differ from `have`, as soon as there are any.

        Keys: "predictor" {"blob", "version", "source"}; "states" SLM -> replica -> report;
        "registry" SLM -> {"spec", "app_name"}. Each comes as {"version": int, "value": ...}; pass
        the versions back as `have`. Empty after timeout_s (at most MAX_WAIT_S).
        """
        self._start()
        return await self._board.wait(have, min(max(timeout_s, 0.0), MAX_WAIT_S))

    async def report_state(
        self, slm_id: str, replica_id: str, state: str, ready_s: Mapping[str, float], detail: str
    ) -> None:
        """A replica says where its start-up is: seconds by phase so far, `detail` for people."""
        times = {k: float(v) for k, v in ready_s.items()}
        report = {"state": state, "ready_s": times, "detail": detail[:500], "at": self._clock()}
        self._states.report(slm_id, replica_id, report)
        self._board.publish("states", self._states.snapshot())

    async def register(self, spec_json: str, app_name: str) -> None:
        """Add an SLM application, or renew its heartbeat. Raises ConfigError."""
        self._start()
        if self._roster.register(spec_json, app_name, [s.id for s in self._fleet.slms]):
            await self._publish_registry()

    async def unregister(self, slm_id: str) -> None:
        """Remove an SLM application; unknown ids are fine."""
        if self._roster.unregister(slm_id):
            await self._publish_registry()

    async def retrain(self, force: bool = False) -> dict[str, Any]:
        """Train and judge now, and publish a better predictor; return the verdict.

        Without `force`, fewer than min_outcomes labelled outcomes give the reason
        "too_few_outcomes". Joins a training that is running. Raises KnowledgeError.
        """
        if self._retraining is None or self._retraining.done():
            labelled = await self._in_thread(self._store.labelled_count)
            if not force and labelled < self._learning.min_outcomes:
                return {"publish": False, "reason": "too_few_outcomes", "labelled": labelled}
            if self._retraining is None or self._retraining.done():
                self._retraining = asyncio.create_task(self._retrain())
        # Shielded: a caller who gives up does not end the training.
        return await asyncio.shield(self._retraining)

    async def status(self) -> dict[str, Any]:
        """Counts, champion and last verdict, for people."""
        champion = self._champion
        return {
            "outcomes": await self._in_thread(self._store.count),
            "labelled": await self._in_thread(self._store.labelled_count),
            "labelled_total": await self._in_thread(self._store.labelled_total),
            "refused_rows": self._refused_rows,
            "predictor": champion.artifact.version if champion else "prior",
            "predictor_source": champion.source if champion else "prior",
            "predictor_metrics": dict(champion.artifact.metrics) if champion else {},
            "retraining": self._retraining is not None and not self._retraining.done(),
            "last_verdict": self._last_verdict,
            "registered": sorted(self._roster.ids()),
        }

    async def tick(self) -> None:
        """Background work that is due: drop SLM applications whose heartbeat stopped."""
        if self._roster.expire():
            await self._publish_registry()

    async def prune(self) -> int:
        """Delete outcomes beyond `learning.max_rows`, oldest first; return how many."""
        return await self._in_thread(lambda: self._store.prune(self._learning.max_rows))

    async def close(self) -> None:
        """Stop background work and close the store; a running training is ended."""
        self._closing.set()
        if self._retraining is not None:
            self._retraining.cancel()
        tasks = [t for t in (self._background, self._retraining) if t is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._in_thread(self._store.close)
        self._io.shutdown()

    def _start(self) -> None:
        """Start the background loop at the first call: a constructor has no event loop."""
        if self._background is None:
            self._background = asyncio.create_task(self._run())

    async def _run(self) -> None:
        ticks = 0
        while True:
            try:
                await asyncio.wait_for(self._closing.wait(), TICK_S)
                return
            except TimeoutError:
                ticks += 1
            try:
                await self.tick()
                if ticks % PRUNE_EVERY_TICKS == 0:
                    await self.prune()
            except KnowledgeError as error:
                _log.warning("background work failed: %s", error.message)

    async def _maybe_retrain(self) -> None:
        if self._retraining is not None and not self._retraining.done():
            return
        total = await self._in_thread(self._store.labelled_total)
        trained_at = int(await self._in_thread(lambda: self._store.meta("trained_at")) or 0)
        due = self._learning.retrain_every if trained_at else self._learning.min_outcomes
        if total - trained_at < due or (self._retraining and not self._retraining.done()):
            return
        self._retraining = asyncio.create_task(self._retrain())
        self._retraining.add_done_callback(_log_failure)

    async def _retrain(self) -> dict[str, Any]:
        """Train once; a failure counts as an attempt, or the next batch would try again."""
        total = await self._in_thread(self._store.labelled_total)
        await self._in_thread(lambda: self._store.set_meta("trained_at", str(total)))
        champion = self._champion
        job = RetrainJob(
            store_url=self._store_url,
            slm_ids=(*(s.id for s in self._fleet.slms), *self._roster.ids()),
            champion=champion.blob if champion else None,
            holdout_ratio=self._learning.holdout_ratio,
        )
        try:
            result = await self._trainer(job)
        except KnowledgeError as error:
            self._last_verdict = {"publish": False, "reason": "failed", "detail": error.message}
            raise
        if result.blob is not None:
            await self._publish(result.blob)
        self._last_verdict = {
            **result.verdict,
            "version": result.version,
            "against": champion.artifact.version if champion else "base_rate",
            "metrics": result.metrics,
        }
        return self._last_verdict

    async def _publish(self, blob: bytes) -> None:
        champion = Champion(Artifact.from_bytes(blob), blob, "trained")
        await self._in_thread(lambda: save_champion(self._state_dir, blob))
        await self._in_thread(lambda: self._store.set_meta("champion", champion.artifact.version))
        self._champion = champion
        self._board.publish("predictor", _published(champion))

    async def _publish_registry(self) -> None:
        registry = self._roster.snapshot()
        self._board.publish("registry", registry)
        # Kept, so that a restart does not take every SLM application off the air until it calls.
        await self._in_thread(lambda: self._store.set_meta("registry", json.dumps(registry)))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._io, call)


def _published(champion: Champion) -> dict[str, Any]:
    return {
        "blob": champion.blob,
        "version": champion.artifact.version,
        "source": champion.source,
    }


def _log_failure(task: asyncio.Task[dict[str, Any]]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.warning("retraining failed: %s", error)
