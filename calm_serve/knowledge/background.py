"""Background work: independent steps, and a ticker that repeats them."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from calm_serve.errors import KnowledgeError

_log = logging.getLogger(__name__)


async def take_steps(*steps: Callable[[], Any]) -> None:
    """Run every step, awaiting those that return an awaitable; a failure is logged.

    A failed step does not stop the others, and no error reaches the caller, which would otherwise
    send outcomes again that are already durable.
    """
    for step in steps:
        try:
            waiting = step()
            if inspect.isawaitable(waiting):
                await waiting
        except KnowledgeError as error:
            _log.warning("knowledge: %s", error.message)
        except Exception:  # noqa: BLE001  # of any kind; the other steps go on
            _log.exception("a step of the knowledge service failed")


class Ticker:
    """Awaits `tick`, which must not raise, every `period_s` seconds after `start`."""

    def __init__(self, tick: Callable[[], Awaitable[None]], period_s: float) -> None:
        self._tick, self._period_s = tick, period_s
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Start in the running event loop. The constructor may run before there is one."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Wait for the current tick; no further one follows."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(self._period_s):
                    await self._stopping.wait()
            except TimeoutError:
                await self._tick()
