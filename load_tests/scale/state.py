"""How much a router process keeps: bytes of everything that its parts reach."""

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

# Code, and the event loop's own objects, which lead to everything in the process.
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
    """Bytes and number of objects that each part reaches, by `sys.getsizeof` over referents.

    An object counts for the first part that reaches it; what `shared` reaches (the fleet, the
    predictor) does not grow with requests and counts for nobody.
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
    """Let the background tasks of this event loop run."""
    for _ in range(ticks):
        await asyncio.sleep(0)


async def slow_actor_rows(folder: Path) -> int:
    """Most outcomes in memory while they come twice as fast as they are acknowledged.

    Nothing fails: every batch is acknowledged once two more have come.
    """
    asked, release = asyncio.Event(), asyncio.Event()
    closing = False

    async def acknowledge(_rows: Sequence[Outcome]) -> None:
        asked.set()
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
        await asked.wait()
        asked.clear()
    closing = True
    await sender.stop()
    return most
