"""A versioned bulletin board: readers wait until something they have not seen is there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any


class Board:
    """Latest value per key. Used from one event loop only.

    Versions start at `first_version`. Readers compare for difference, not for order, so a board
    that starts anew after a crash is read again as long as its first version is another one.
    """

    def __init__(self, first_version: int) -> None:
        self._next = first_version
        self._entries: dict[str, tuple[int, Any]] = {}
        self._changed = asyncio.Event()

    def publish(self, key: str, value: Any) -> None:
        """Replace the value of `key` and wake every reader."""
        self._entries[key] = (self._next, value)
        self._next += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def newer(self, have: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Entries whose version differs: key -> {"version": int, "value": ...}."""
        return {
            key: {"version": version, "value": value}
            for key, (version, value) in self._entries.items()
            if have.get(key) != version
        }

    async def wait(self, have: Mapping[str, int], timeout_s: float) -> dict[str, dict[str, Any]]:
        """As `newer`, after waiting up to `timeout_s` for anything; empty on timeout."""
        changed = self._changed
        if not (found := self.newer(have)):
            try:
                await asyncio.wait_for(changed.wait(), timeout_s)
            except TimeoutError:
                return {}
            found = self.newer(have)
        return found
