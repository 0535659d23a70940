"""Which predictor decides: the champion, its challenger in the shadow, and the way back.

A challenger that won the gate decides silently until `learning.shadow_requests` scored requests
have been compared, then replaces the champion unless live answers speak against it. The champion
stays on probation: when it is surely worse than its predecessor would have been, on the answers
that it was itself responsible for, the predecessor is published again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calm_serve.config import Learning
from calm_serve.errors import RequestError
from calm_serve.learning.evaluation import (
    LabelledLog,
    PostPromotionEvaluation,
    objection,
    shadow_note,
    shadow_verdict,
)
from calm_serve.learning.model_registry import (
    SHIPPED,
    TRAINED,
    Champion,
    Index,
    Model,
    ModelRegistry,
    PredictorState,
    find_model,
    load_shipped,
    read_model,
    restore_champion,
)
from calm_serve.learning.shadow import ShadowTally
from calm_serve.prediction import Artifact
from calm_serve.protocol.topics import PredictorChange, PredictorStatus, PublishedPredictor, Topic
from calm_serve.types import Outcome

# Thin traffic must not hold a better predictor back: after this long the shadow is judged anyway.
SHADOW_MAX_S = 60.0
SHADOW_ROWS = 2000

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
_log = logging.getLogger(__name__)


class Promotion:
    """The published predictor and its rivals. Used from one event loop.

    `publish` takes a topic (PREDICTOR, CHALLENGER, PREDICTORS) and its record. `in_thread` runs
    what blocks on the store or the disk; `clock` returns Unix seconds.
    """

    def __init__(
        self,
        learning: Learning,
        shipped_dir: str,
        state_dir: Path,
        *,
        store: LabelledLog,
        publish: Callable[[Topic, Any], None],
        in_thread: InThread,
        clock: Callable[[], float],
    ) -> None:
        """Load what an earlier run left (blocks; once). Raises KnowledgeError."""
        self.learning = learning
        self._store, self._publish, self._in_thread = store, publish, in_thread
        self._clock = clock
        self._lock = asyncio.Lock()
        self._registry = ModelRegistry(state_dir)
        self._post_promotion = PostPromotionEvaluation(store, in_thread)
        self._announced: PredictorStatus | None = None
        self._tally: ShadowTally | None = None
        self._challenger = find_model(self._registry, PredictorState.CHALLENGER)
        self._previous = find_model(self._registry, PredictorState.PREVIOUS)
        self.champion = restore_champion(self._registry, state_dir, shipped_dir)
        self._announce_all()

    async def offer(self, blob: bytes, against: str | None = None) -> str:
        """Take a challenger that won the gate, `against` a champion's version; say what became.

        "promoted": it decides; "shadow": it has to be compared first; "refused": it was tried
        before and was worse; "outdated": another champion decides than the one that it beat.
        """
        offered = Champion(Artifact.from_bytes(blob), blob, TRAINED)
        async with self._lock:
            if against is not None and against != self._version:
                return "outdated"
            if self._registry.index.was_worse(offered.artifact.version):
                return "refused"
            pinned = bool(self._registry.index.pinned)
            if not pinned and (self.champion is None or not self.learning.shadow_requests):
                await self._promote(offered, "won the gate")
                return "promoted"
            index = self._registry.index.turned(
                PredictorState.CHALLENGER, PredictorState.RETIRED, "replaced before it was promoted"
            )
            entry = Model.of(offered.artifact, TRAINED, PredictorState.CHALLENGER)
            await self._write(index.with_model(entry), offered)
            # The clock of a challenger that is replaced goes on: trainings that follow each other
            # quickly would otherwise never get one promoted.
            now = self._clock()
            waiting = self._tally.waiting_since if self._tally else now
            self._challenger = offered
            self._tally = ShadowTally(offered.artifact.version, now, waiting)
            self._announce_challenger()
            return "shadow"

    async def ship(self, shipped_dir: str) -> None:
        """Follow a fleet that ships another predictor; one that was trained or pinned stays."""
        async with self._lock:
            found = await self._in_thread(lambda: load_shipped(shipped_dir))
            index, trained = self._registry.index, self.champion and self.champion.source != SHIPPED
            if found is None or index.pinned or trained:
                return
            version = found.artifact.version
            if version != self._version and not index.was_worse(version):
                await self._promote(found, "shipped with the fleet")

    async def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Count what routers report of the challenger; promote or reject it when that is enough."""
        if self._tally is None:
            return
        for outcome in outcomes:
            self._tally.add(outcome)
        if self._tally.requests >= self.learning.shadow_requests:
            await self._end_shadow(self._tally)

    async def tick(self) -> None:
        """Background work that is due: probation, a shadow that got no requests, the summary."""
        tally = self._tally
        if tally is not None and self._clock() - tally.waiting_since >= SHADOW_MAX_S:
            await self._end_shadow(tally)
        await self._check_champion()
        self._announce_models()

    async def act(self, action: str, version: str) -> None:
        """What an operator asks for: "pin" a version, "unpin", "rollback". Raises RequestError."""
        if action == "pin":
            await self.pin(version)
        elif action == "unpin":
            await self.unpin()
        elif action == "rollback":
            await self.rollback()
        else:
            known = "pin, unpin, rollback"
            raise RequestError(f"unknown action {action!r}; known: {known}", param="action")

    async def pin(self, version: str) -> None:
        """Let a stored predictor decide until `unpin`. Raises RequestError for an unknown one."""
        async with self._lock:
            model = self._registry.index.by_version.get(version)
            if model is None:
                raise RequestError(f"no predictor {version!r} is stored", param="version")
            if self.champion is None or version != self.champion.artifact.version:
                target = await self._in_thread(lambda: read_model(self._registry, model))
                await self._promote(target, "pinned by the operator", pinned=version)
            else:
                await self._write(replace(self._registry.index, pinned=version))
            self._announce_models()

    async def unpin(self) -> None:
        """Let challengers be promoted again; the champion stays."""
        async with self._lock:
            await self._write(replace(self._registry.index, pinned=""))
            self._announce_models()

    async def rollback(self, reason: str = "asked for by the operator") -> None:
        """Publish the previous predictor again and mark the champion.

        Raises RequestError without a previous one, or when one is pinned.
        """
        async with self._lock:
            if self._registry.index.pinned:
                raise RequestError(f"{self._registry.index.pinned!r} is pinned; unpin it first")
            if self._previous is None or self.champion is None:
                raise RequestError("there is no previous predictor to roll back to")
            await self._roll_back(self.champion, self._previous, reason)

    def summary(self) -> PredictorStatus:
        """What routers show under `predictor` in /v1/fleet, and what `document` starts with."""
        index = self._registry.index
        return PredictorStatus(
            previous=self._previous.artifact.version if self._previous else "",
            challenger=self._challenger.artifact.version if self._challenger else "",
            pinned=index.pinned,
            shadow=None if self._tally is None else self._tally.report(),
            post_promotion=self._post_promotion.latest,
            last_change=index.last_change,
        )

    def document(self) -> dict[str, Any]:
        """What GET /v1/predictors answers: the summary and every stored predictor."""
        models = [asdict(model) for model in self._registry.index.models]
        return {"object": "list", "data": models, **asdict(self.summary())}

    async def _end_shadow(self, tally: ShadowTally) -> None:
        async with self._lock:
            challenger, champion = self._challenger, self.champion
            if tally is not self._tally:  # another challenger came while this one's end was due
                return
            if challenger is None or champion is None or self._registry.index.pinned:
                return
            rows = await self._in_thread(lambda: self._store.recent(SHADOW_ROWS, labelled=True))
            rows = [o for o in rows if o.at >= tally.since]
            verdict = await asyncio.to_thread(
                shadow_verdict, rows, champion.artifact, challenger.artifact
            )
            against, note = objection(verdict), shadow_note(tally, verdict)
            if not against:
                await self._promote(challenger, note)
                return
            _log.warning(
                "challenger %s rejected: %s; %s", challenger.artifact.version, against, note
            )
            index = self._registry.index.turned(
                PredictorState.CHALLENGER, PredictorState.REJECTED, f"{against}; {note}"
            )
            await self._write(index)
            self._challenger, self._tally = None, None
            self._announce_challenger()

    async def _promote(self, target: Champion, note: str, pinned: str = "") -> None:
        before = self.champion
        index = self._registry.index.turned(PredictorState.PREVIOUS, PredictorState.RETIRED)
        index = index.turned(PredictorState.CHAMPION, PredictorState.PREVIOUS)
        if self._challenger and self._challenger.artifact.version != target.artifact.version:
            index = index.turned(
                PredictorState.CHALLENGER, PredictorState.RETIRED, "another one decides"
            )
        entry = Model.of(target.artifact, target.source, PredictorState.CHAMPION, note)
        index = replace(
            index.with_model(replace(entry, published_at=self._clock())),
            pinned=pinned,
            last_change=self._change("pinned" if pinned else "promoted", target, note),
        )
        await self._write(index, target)
        self.champion, self._previous = target, before
        self._challenger, self._tally = None, None
        self._post_promotion.begin()
        self._announce_all()

    async def _roll_back(self, champion: Champion, previous: Champion, reason: str) -> None:
        index = self._registry.index.turned(
            PredictorState.CHALLENGER,
            PredictorState.RETIRED,
            "beat a predictor that was rolled back",
        )
        index = index.turned(PredictorState.CHAMPION, PredictorState.ROLLED_BACK, reason)
        index = index.turned(PredictorState.PREVIOUS, PredictorState.CHAMPION, "rolled back to")
        change = self._change("rolled_back", previous, reason)
        await self._write(replace(index, last_change=change))
        _log.warning(
            "predictor %s rolled back to %s: %s",
            champion.artifact.version,
            previous.artifact.version,
            reason,
        )
        self.champion, self._previous = previous, None
        self._challenger, self._tally = None, None
        self._post_promotion.begin()
        self._announce_all()

    async def _check_champion(self) -> None:
        champion, previous = self.champion, self._previous
        if champion is None or previous is None or self._registry.index.pinned:
            return
        found = await self._post_promotion.check(champion.artifact, previous.artifact)
        if found is None or not found.surely_worse:
            return
        async with self._lock:
            # Whoever decides now may be somebody else, whom this verdict does not concern.
            if self.champion is champion and not self._registry.index.pinned:
                await self._roll_back(champion, previous, found.reason(previous.artifact.version))

    @property
    def _version(self) -> str:
        return self.champion.artifact.version if self.champion else ""

    def _change(self, action: str, target: Champion, reason: str) -> PredictorChange:
        return PredictorChange(
            self._clock(), action, target.artifact.version, self._version, reason
        )

    async def _write(self, index: Index, model: Champion | None = None) -> None:
        blobs = {} if model is None else {model.artifact.version: model.blob}
        await self._in_thread(lambda: self._registry.write(index, blobs))

    def _announce_all(self) -> None:
        if self.champion is not None:
            self._publish(Topic.PREDICTOR, _published(self.champion))
        if self._challenger is not None and self._tally is None:  # after a restart: begin anew
            now = self._clock()
            self._tally = ShadowTally(self._challenger.artifact.version, now, now)
        self._announce_challenger()

    def _announce_challenger(self) -> None:
        challenger = self._challenger
        self._publish(Topic.CHALLENGER, None if challenger is None else _published(challenger))
        self._announce_models()

    def _announce_models(self) -> None:
        if (summary := self.summary()) != self._announced:
            self._announced = summary
            self._publish(Topic.PREDICTORS, summary)


def _published(champion: Champion) -> PublishedPredictor:
    return PublishedPredictor(champion.artifact.version, champion.source, champion.blob)
