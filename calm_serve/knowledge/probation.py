"""The champion on probation: asked again whenever enough new labels have come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from calm_serve.knowledge.live_evidence import WINDOW, Calibration, live_calibration
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.prediction import Artifact

CHECK_EVERY_LABELS = 25


class Probation:
    """What live answers said of the present champion so far. Used from one event loop."""

    def __init__(
        self, store: OutcomeStore, in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    ) -> None:
        self._store, self._in_thread = store, in_thread
        self._found: Calibration | None = None
        self._checked_labels = 0
        self._champions = 0

    def begin(self) -> None:
        """Another champion decides."""
        self._found = None
        self._champions += 1

    async def check(self, champion: Artifact, previous: Artifact) -> Calibration | None:
        """Compare both on the newest labels, if that is due; None if not, or with too few."""
        total = await self._in_thread(self._store.labelled_total)
        if total - self._checked_labels < CHECK_EVERY_LABELS:
            return None
        self._checked_labels, asked = total, self._champions
        rows = await self._in_thread(lambda: self._store.recent(WINDOW, labelled=True))
        found = await asyncio.to_thread(live_calibration, rows, champion, previous)
        if self._champions != asked:
            return None
        self._found = found
        return found

    def summary(self) -> dict[str, Any] | None:
        """The last comparison as plain data, None before there was one."""
        return None if self._found is None else asdict(self._found)
