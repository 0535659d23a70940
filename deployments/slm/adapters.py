"""A LoRA adapter in the memory of an SLM replica."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

# Longest that unloading waits for the adapter's running requests before it frees the slot.
UNLOAD_TIMEOUT_S = 120.0


class ResidentAdapter:
    """A loaded adapter. Serve's LRU may evict it while requests run; unloading waits for them."""

    def __init__(self, name: str, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self._engine = engine
        self._loop = loop
        self._idle = threading.Event()
        self._idle.set()
        self._running = 0
        self._unloaded = False

    @contextlib.contextmanager
    def in_use(self) -> Any:
        """Keep the adapter loaded for the duration of one request."""
        self._running += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def __del__(self) -> None:
        # Serve calls this in a thread when its LRU evicts the adapter; the garbage collector calls
        # it again.
        if self._unloaded or self._loop.is_closed():
            return
        self._unloaded = True
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is self._loop:
                return  # on the event loop, by the garbage collector: the replica is shutting down
        self._idle.wait(UNLOAD_TIMEOUT_S)
        asyncio.run_coroutine_threadsafe(self._engine.unload_adapter(self.name), self._loop).result(
            UNLOAD_TIMEOUT_S
        )
