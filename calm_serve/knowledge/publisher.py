"""Publisher: topics with revisions; followers wait for a record that they have not seen."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from calm_serve.protocol.topics import FORMATS, Topic, Update


class Publisher:
    """Latest record of each topic. Used from one event loop only.

    Revisions start at `first_revision`. Followers compare them for equality, not for order, so
    after a restart they read every topic again if the new revisions differ from the old.
    """

    def __init__(self, first_revision: int) -> None:
        self._next = first_revision
        self._records: dict[Topic, Any] = {}
        self._updates: dict[Topic, Update] = {}
        self._changed = asyncio.Event()

    def publish(self, topic: Topic, record: Any) -> None:
        """Replace the topic's record and wake every follower. The record must not change later."""
        self._records[topic] = record
        self._updates[topic] = Update(self._next, FORMATS[topic].encode(record))
        self._next += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def record(self, topic: Topic) -> Any:
        """The latest record of a topic, None before the first."""
        return self._records.get(topic)

    def newer(
        self, seen: Mapping[str, int], topics: Collection[str] | None = None
    ) -> dict[str, Update]:
        """Updates (of `topics`) whose revision is not the one in `seen`, by topic."""
        return {
            str(topic): update
            for topic, update in self._updates.items()
            if seen.get(topic) != update.revision and (topics is None or topic in topics)
        }

    async def wait(
        self, seen: Mapping[str, int], timeout_s: float, topics: Collection[str] | None = None
    ) -> dict[str, Update]:
        """As `newer`, but wait up to `timeout_s` for the first update; empty on timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := self.newer(seen, topics)):
                    await self._changed.wait()
        except TimeoutError:
            return {}
        return found
