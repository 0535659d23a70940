"""A versioned bulletin board: readers wait until something they have not seen is there."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any


class Publisher:
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

    def value(self, key: str) -> Any:
        """The latest value of `key`, None before there was one."""
        return self._entries.get(key, (0, None))[1]

    def newer(
        self, have: Mapping[str, int], keys: Collection[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Entries (of `keys`) whose version differs: key -> {"version": int, "value": ...}."""
        return {
            key: {"version": version, "value": value}
            for key, (version, value) in self._entries.items()
            if have.get(key) != version and (keys is None or key in keys)
        }

    async def wait(
        self, have: Mapping[str, int], timeout_s: float, keys: Collection[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """As `newer`, after waiting up to `timeout_s` for anything; empty on timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := self.newer(have, keys)):
                    await self._changed.wait()
        except TimeoutError:
            return {}
        return found
