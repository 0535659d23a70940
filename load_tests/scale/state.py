"""State of a router process: bytes of all objects that its parts reference."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType, ModuleType

from calm_serve.testing import make_outcome
from calm_serve.types import Outcome
from deployments.knowledge.outcome_outbox import BATCH_ROWS, OutcomeOutbox

# References are not followed into code and the event loop's objects, which reference everything in
# the process.
_STOP = (
    type,
    ModuleType,
    FunctionType,
    MethodType,
    asyncio.AbstractEventLoop,
    asyncio.Future,
    asyncio.Event,
)
SLOW_BATCHES = 100


def sizes(parts: Mapping[str, object], shared: Sequence[object]) -> dict[str, tuple[int, int]]:
    """Bytes and number of objects reachable from each part, by `sys.getsizeof`.

    An object counts for the first part that reaches it. Objects reachable from `shared` (the fleet,
    the predictor) do not grow with requests and are not counted.
    """
    seen: set[int] = set()
    _walk(shared, seen)
    return {name: _walk((part,), seen) for name, part in parts.items()}


def _walk(roots: Iterable[object], seen: set[int]) -> tuple[int, int]:
    size_bytes = objects = 0
    waiting = deque(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _STOP):
            continue
        seen.add(id(one))
        size_bytes += sys.getsizeof(one)
        objects += 1
        waiting.extend(gc.get_referents(one))
    return size_bytes, objects


async def settle(ticks: int = 8) -> None:
    """Run the event loop's other tasks for some ticks."""
    for _ in range(ticks):
        await asyncio.sleep(0)


async def slow_actor_rows(folder: Path) -> int:
    """Maximum of outcomes in memory while they arrive twice as fast as they are acknowledged.

    Nothing fails: every batch is acknowledged when two more have arrived.
    """
    called, release = asyncio.Event(), asyncio.Event()
    closing = False

    async def acknowledge(_rows: Sequence[Outcome]) -> None:
        called.set()
        if not closing:
            await release.wait()
            release.clear()

    sender = OutcomeOutbox(acknowledge, folder / "slow.jsonl")
    sender.start()
    most = 0
    for batch in range(SLOW_BATCHES):
        for i in range(2 * BATCH_ROWS):
            sender.add(make_outcome(f"slow-{batch}-{i}"))
        most = max(most, sender.pending_rows)
        release.set()
        await called.wait()
        called.clear()
    closing = True
    await sender.stop()
    return most
