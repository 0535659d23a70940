"""Streams whose SLM is waking: the client hears comments until the answer begins."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from deployments.dispatch import cancel

QUIET_S = 1.0  # a stream waits this long before its headers go out without an answer
PERIOD_S = 1.0
COMMENT = b": waking\n\n"  # server-sent events: lines that begin with a colon are ignored

T = TypeVar("T")


async def within(opening: Awaitable[T], quiet_s: float) -> asyncio.Future[T]:
    """Start `opening`, wait for it for `quiet_s` and return it, done or not.

    Cancelled together with the caller.
    """
    task = asyncio.ensure_future(opening)
    try:
        await asyncio.wait({task}, timeout=quiet_s)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task


def abandoned_with(stream: AsyncIterator[T], opening: asyncio.Future[Any]) -> AsyncIterator[T]:
    """The stream; `opening` is cancelled with it, should nobody ever begin to read."""
    weakref.finalize(stream, give_up, opening).atexit = False
    return stream


def give_up(opening: asyncio.Future[Any]) -> None:
    """Stop an opening, or the answer that came of it and that nobody will read."""
    if not opening.cancel() and not opening.cancelled() and opening.exception() is None:
        cancel(opening.result())


async def comments(opening: asyncio.Future[T], period_s: float) -> AsyncIterator[bytes]:
    """A comment now and in each period, until `opening` is done."""
    while not opening.done():
        yield COMMENT
        await asyncio.wait({opening}, timeout=period_s)
