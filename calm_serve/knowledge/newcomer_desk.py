"""Newcomers in the knowledge actor: who is new, what is said of them, and what routers are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from calm_serve.config import Fleet, SLMSpec
from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.newcomers import Newcomers, fit, known_slms
from calm_serve.prediction import Artifact
from calm_serve.types import Outcome, QualitySignal

META = "newcomers"
_log = logging.getLogger(__name__)


class NewcomerDesk:
    """Used from one event loop; fits happen in a thread, one at a time.

    `publish` gets {"blob", "version"}, or None once nobody is new any more; `clock` returns Unix
    seconds. Without a champion nobody is new: there is nobody who knows the others either.
    """

    def __init__(
        self, publish: Callable[[dict[str, Any] | None], None], clock: Callable[[], float]
    ) -> None:
        self._publish, self._clock = publish, clock
        self._newcomers = Newcomers()
        self._new: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()

    def observe(self, outcomes: Iterable[Outcome]) -> None:
        """Count outcomes with their signals."""
        if self._new:
            self._newcomers.observe(outcomes)

    def feedback(self, outcome_id: str, signals: Sequence[QualitySignal]) -> None:
        """Count what was said of an answer."""
        if self._new:
            self._newcomers.feedback(outcome_id, signals)

    async def teach(
        self, fleet: Fleet, joined: Sequence[SLMSpec], champion: Artifact | None
    ) -> None:
        """Follow fleet and champion, fit what is due and publish it; cheap when nothing is."""
        if self._lock.locked():
            return  # the next batch comes within seconds
        async with self._lock:
            specs = (*fleet.slms, *joined)
            ids = frozenset(s.id for s in specs)
            new = ids - known_slms(champion) if champion is not None else frozenset[str]()
            if new != self._new:
                whole = fleet.model_copy(update={"slms": specs})
                self._newcomers.follow(whole, ids - new)
                if not new:
                    self._publish(None)
                self._new = new
            job = self._newcomers.job() if new else None
            if job is None:
                return
            try:
                artifact = await asyncio.to_thread(fit, job, self._clock())
            except KnowledgeError as error:
                _log.warning("newcomers not learned: %s", error.message)
                return
            if artifact is not None:
                self._publish({"blob": artifact.to_bytes(), "version": artifact.version})
                _log.info("newcomers %s learned as %s", sorted(new), artifact.version)
