"""Promotion: which predictor is the champion, which the challenger, and when to roll back.

A challenger that passed the promotion test decides in the shadow until `learning.shadow_requests`
scored requests have been compared, then replaces the champion unless live answers speak against it.
After that the champion is compared with its predecessor on the answers that it predicted itself;
when it is worse with high confidence, the predecessor is published again.
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
    Index,
    LoadedPredictor,
    ModelRegistry,
    PredictorState,
    RegisteredPredictor,
    load_shipped,
    restore_champion,
)
from calm_serve.learning.shadow import ShadowTally
from calm_serve.prediction import Artifact
from calm_serve.protocol.topics import PredictorChange, PredictorStatus, PublishedPredictor, Topic
from calm_serve.types import Outcome

# The shadow ends after this many seconds even with too few requests, so that thin traffic does not
# delay a better predictor.
SHADOW_MAX_S = 60.0
SHADOW_ROWS = 2000  # newest labelled outcomes that are read for its verdict

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
_log = logging.getLogger(__name__)


class Promotion:
    """Champion, challenger and previous predictor of one application. Used from one event loop.

    `publish` takes a topic (PREDICTOR, CHALLENGER, PREDICTORS) and its record. `in_thread` runs
    calls that block on the store or the disk; `clock` returns Unix seconds.
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
        """Load the predictors of an earlier run (blocks; once). Raises KnowledgeError."""
        self.learning = learning
        self._store, self._publish, self._in_thread = store, publish, in_thread
        self._clock = clock
        self._lock = asyncio.Lock()
        self._registry = ModelRegistry(state_dir)
        self._post_promotion = PostPromotionEvaluation(store, in_thread)
        self._published_status: PredictorStatus | None = None
        self._tally: ShadowTally | None = None
        self._challenger = self._registry.find(PredictorState.CHALLENGER)
        self._previous = self._registry.find(PredictorState.PREVIOUS)
        self.champion = restore_champion(self._registry, shipped_dir)
        self._publish_all()

    async def offer(self, blob: bytes, against: str | None = None) -> str:
        """Take a challenger that passed the promotion test; it beat the champion `against`.

        Returns "promoted": it is the champion; "shadow": it decides in the shadow first; "refused":
        it was rolled back or rejected before; "outdated": the champion is no longer the one it
        beat.
        """
        offered = LoadedPredictor(Artifact.from_bytes(blob), blob, TRAINED)
        async with self._lock:
            if against is not None and against != self._version:
                return "outdated"
            if self._registry.index.was_worse(offered.version):
                return "refused"
            pinned = bool(self._registry.index.pinned)
            if not pinned and (self.champion is None or not self.learning.shadow_requests):
                await self._promote(offered, "passed the promotion test")
                return "promoted"
            index = self._registry.index.with_transition(
                PredictorState.CHALLENGER, PredictorState.RETIRED, "replaced before it was promoted"
            )
            entry = RegisteredPredictor.of(offered, PredictorState.CHALLENGER)
            await self._write(index.with_predictor(entry), offered)
            # The wait of a replaced challenger counts for its successor: otherwise trainings in
            # quick succession would never end in a promotion.
            now = self._clock()
            waiting = self._tally.waiting_since if self._tally else now
            self._challenger = offered
            self._tally = ShadowTally(offered.version, now, waiting)
            self._publish_challenger()
            return "shadow"

    async def ship(self, shipped_dir: str) -> None:
        """Promote the predictor of a redeployed fleet; a trained or pinned champion stays."""
        async with self._lock:
            shipped = await self._in_thread(lambda: load_shipped(shipped_dir))
            index, trained = self._registry.index, self.champion and self.champion.source != SHIPPED
            if shipped is None or index.pinned or trained:
                return
            if shipped.version != self._version and not index.was_worse(shipped.version):
                await self._promote(shipped, "shipped with the fleet")

    async def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Count logged choices of the challenger; promote or reject it after enough of them."""
        if self._tally is None:
            return
        for outcome in outcomes:
            self._tally.add(outcome)
        if self._tally.requests >= self.learning.shadow_requests:
            await self._end_shadow(self._tally)

    async def tick(self) -> None:
        """Background work that is due: the shadow's time limit, the evaluation, the summary."""
        tally = self._tally
        if tally is not None and self._clock() - tally.waiting_since >= SHADOW_MAX_S:
            await self._end_shadow(tally)
        await self._check_champion()
        self._publish_status()

    async def act(self, action: str, version: str) -> None:
        """An operator's command: "pin" a version, "unpin", "rollback". Raises RequestError."""
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
        """Make a stored predictor champion until `unpin`; RequestError for an unknown version."""
        async with self._lock:
            entry = self._registry.index.by_version.get(version)
            if entry is None:
                raise RequestError(f"no predictor {version!r} is stored", param="version")
            if version != self._version:
                target = await self._in_thread(lambda: self._registry.load(entry))
                await self._promote(target, "pinned by the operator", pinned=version)
            else:
                await self._write(replace(self._registry.index, pinned=version))
            self._publish_status()

    async def unpin(self) -> None:
        """Allow promotions again; the champion stays."""
        async with self._lock:
            await self._write(replace(self._registry.index, pinned=""))
            self._publish_status()

    async def rollback(self, reason: str = "requested by the operator") -> None:
        """Publish the previous predictor again and mark the champion as rolled back.

        Raises RequestError without a previous one, or when one is pinned.
        """
        async with self._lock:
            if self._registry.index.pinned:
                raise RequestError(f"{self._registry.index.pinned!r} is pinned; unpin it first")
            if self._previous is None or self.champion is None:
                raise RequestError("there is no previous predictor to roll back to")
            await self._roll_back(self.champion, self._previous, reason)

    def summary(self) -> PredictorStatus:
        """Status of all predictors, for /v1/fleet and /v1/predictors."""
        index = self._registry.index
        return PredictorStatus(
            previous=self._previous.version if self._previous else "",
            challenger=self._challenger.version if self._challenger else "",
            pinned=index.pinned,
            shadow=None if self._tally is None else self._tally.report(),
            post_promotion=self._post_promotion.latest,
            last_change=index.last_change,
        )

    def document(self) -> dict[str, Any]:
        """Answer of GET /v1/predictors: every stored predictor, and the summary."""
        predictors = [asdict(entry) for entry in self._registry.index.predictors]
        return {"object": "list", "data": predictors, **asdict(self.summary())}

    async def _end_shadow(self, tally: ShadowTally) -> None:
        async with self._lock:
            challenger, champion = self._challenger, self.champion
            if tally is not self._tally:  # another challenger replaced this one meanwhile
                return
            if challenger is None or champion is None or self._registry.index.pinned:
                return
            rows = await self._in_thread(lambda: self._store.recent(SHADOW_ROWS, labelled=True))
            rows = [o for o in rows if o.at >= tally.since]
            verdict = await asyncio.to_thread(
                shadow_verdict, rows, champion.artifact, challenger.artifact
            )
            reason, note = objection(verdict), shadow_note(tally, verdict)
            if not reason:
                await self._promote(challenger, note)
                return
            _log.warning("challenger %s rejected: %s; %s", challenger.version, reason, note)
            index = self._registry.index.with_transition(
                PredictorState.CHALLENGER, PredictorState.REJECTED, f"{reason}; {note}"
            )
            await self._write(index)
            self._challenger, self._tally = None, None
            self._publish_challenger()

    async def _promote(self, target: LoadedPredictor, note: str, pinned: str = "") -> None:
        entry = RegisteredPredictor.of(target, PredictorState.CHAMPION, note)
        index = self._registry.index.promoted(
            replace(entry, published_at=self._clock()),
            self._challenger is not None and self._challenger.version != target.version,
        )
        change = self._change("pinned" if pinned else "promoted", target, note)
        await self._write(replace(index, pinned=pinned, last_change=change), target)
        self.champion, self._previous = target, self.champion
        self._challenger, self._tally = None, None
        self._post_promotion.begin()
        self._publish_all()

    async def _roll_back(
        self, champion: LoadedPredictor, previous: LoadedPredictor, reason: str
    ) -> None:
        change = self._change("rolled_back", previous, reason)
        index = self._registry.index.rolled_back(reason)
        await self._write(replace(index, last_change=change))
        _log.warning(
            "predictor %s rolled back to %s: %s", champion.version, previous.version, reason
        )
        self.champion, self._previous = previous, None
        self._challenger, self._tally = None, None
        self._post_promotion.begin()
        self._publish_all()

    async def _check_champion(self) -> None:
        champion, previous = self.champion, self._previous
        if champion is None or previous is None or self._registry.index.pinned:
            return
        found = await self._post_promotion.check(champion.artifact, previous.artifact)
        if found is None or not found.surely_worse:
            return
        async with self._lock:
            # Another predictor may have been published or pinned before the lock was free.
            if self.champion is champion and not self._registry.index.pinned:
                await self._roll_back(champion, previous, found.reason(previous.version))

    @property
    def _version(self) -> str:
        return self.champion.version if self.champion else ""

    def _change(self, action: str, target: LoadedPredictor, reason: str) -> PredictorChange:
        return PredictorChange(self._clock(), action, target.version, self._version, reason)

    async def _write(self, index: Index, predictor: LoadedPredictor | None = None) -> None:
        blobs = {} if predictor is None else {predictor.version: predictor.blob}
        await self._in_thread(lambda: self._registry.write(index, blobs))

    def _publish_all(self) -> None:
        if self.champion is not None:
            self._publish(Topic.PREDICTOR, _record(self.champion))
        if (
            self._challenger is not None and self._tally is None
        ):  # after a restart the shadow starts anew
            now = self._clock()
            self._tally = ShadowTally(self._challenger.version, now, now)
        self._publish_challenger()

    def _publish_challenger(self) -> None:
        challenger = self._challenger
        self._publish(Topic.CHALLENGER, None if challenger is None else _record(challenger))
        self._publish_status()

    def _publish_status(self) -> None:
        if (summary := self.summary()) != self._published_status:
            self._published_status = summary
            self._publish(Topic.PREDICTORS, summary)


def _record(predictor: LoadedPredictor) -> PublishedPredictor:
    return PublishedPredictor(predictor.version, predictor.source, predictor.blob)
