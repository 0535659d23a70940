"""Outbox: delivers outcomes to the knowledge actor in batches, without blocking the router.

The router appends to a list in memory; a background task sends batches and keeps them until the
actor acknowledges that they are durable. While the actor does not answer, outcomes beyond
MEMORY_ROWS move to a spool file, which is sent when the actor is back: by this process or, after
its end, by the next one that uses the folder. Delivery is at least once; the store drops
duplicates.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from calm_serve.errors import KnowledgeError, NewerRecordError
from calm_serve.protocol.outcomes import OUTCOME
from calm_serve.types import Outcome

log = logging.getLogger("ray.serve")

BATCH_ROWS = 256  # outcomes of one call
FLUSH_S = 0.5  # longest time that an outcome waits for its batch to fill
RETRY_S = 2.0  # after a failed call
MEMORY_ROWS = 8_192  # outcomes in memory; more go to the spool
SPOOL_BYTES = 64 << 20  # size of the spool; further outcomes are lost and counted
# If a spool was not written for so long although the actor answers, its process has ended.
ORPHAN_S = 60.0
# Suffix of a spool with outcomes of a newer program. Each process tries it once, at its start.
SET_ASIDE = ".newer"

Send = Callable[[Sequence[Outcome]], Awaitable[None]]


class OutcomeOutbox:
    """Delivers outcomes through `send`, which returns once they are durable and raises otherwise.

    Used by one event loop. `spool` is a file of this process, in a folder that all router
    processes share. `lost_rows` counts outcomes for which neither memory nor spool had room.
    """

    def __init__(self, send: Send, spool: Path) -> None:
        self._send = send
        self._spool = spool
        self._waiting: deque[Outcome] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._next_search = 0.0  # on the event loop's clock
        self._set_aside: list[Path] | None = None  # files of SET_ASIDE that were there at first
        self.lost_rows = 0

    def start(self) -> None:
        """Begin delivering in the running event loop."""
        self._task = asyncio.create_task(self._run())

    def add(self, outcome: Outcome) -> None:
        """Queue one outcome. Never blocks; when memory is full the oldest go to the spool."""
        self._waiting.append(outcome)
        if len(self._waiting) >= BATCH_ROWS:
            self._wake.set()

    @property
    def pending_rows(self) -> int:
        """Unacknowledged outcomes in memory."""
        return len(self._waiting)

    async def stop(self) -> None:
        """Deliver the queued outcomes, or spool them."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._waiting:
            if not await self._deliver():
                rows = list(self._waiting)
                self._waiting.clear()
                await self._keep(rows)

    async def _run(self) -> None:
        while True:
            # Not `wait_for`: in Python 3.11 it swallows a cancellation as `_wake` is set.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                delivered = await self._deliver()
                # Also after a success: the actor may be slower than the outcomes arrive.
                await self._make_room()
                if not delivered:
                    await asyncio.sleep(RETRY_S)
                    break
            else:
                try:
                    await self._replay()
                except OSError as error:  # another process took the spool over, or the disk is full
                    log.warning("spool not replayed now: %s", error)

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """The background task, for health checks."""
        return () if self._task is None else (self._task,)

    async def _deliver(self) -> bool:
        batch = [self._waiting[i] for i in range(min(BATCH_ROWS, len(self._waiting)))]
        try:
            await self._send(batch)
        except Exception as error:  # noqa: BLE001  # of any kind: keep and retry
            log.warning("outcomes not acknowledged, kept: %s", error)
            return False
        for _ in batch:
            self._waiting.popleft()
        return True

    async def _make_room(self) -> None:
        excess = len(self._waiting) - MEMORY_ROWS
        if excess > 0:
            rows = [self._waiting.popleft() for _ in range(excess)]
            await self._keep(rows)

    async def _keep(self, rows: list[Outcome]) -> None:
        try:
            await asyncio.to_thread(self._spill, rows)
        except OSError as error:
            self.lost_rows += len(rows)
            log.error("%d outcomes lost, the spool cannot take them: %s", len(rows), error)

    def _spill(self, rows: list[Outcome]) -> None:
        self._spool.parent.mkdir(parents=True, exist_ok=True)
        if self._spool.exists() and self._spool.stat().st_size >= SPOOL_BYTES:
            raise OSError(f"{self._spool.name} has reached {SPOOL_BYTES} bytes")
        with self._spool.open("ab") as file:
            file.write(b"\n")  # ends a line that a crash or a full disk cut off
            file.writelines(OUTCOME.encode(row) + b"\n" for row in rows)

    async def _replay(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_search:
            self._next_search = now + ORPHAN_S
            await asyncio.to_thread(self._adopt_orphan)
        if not self._spool.exists():
            return
        try:
            rows = await asyncio.to_thread(read_spool, self._spool)
        except NewerRecordError as error:
            aside = self._spool.with_name(f"{self._spool.stem}-{time.time_ns()}{SET_ASIDE}")
            log.error("spool kept as %s: %s", aside.name, error.message)
            await asyncio.to_thread(self._spool.rename, aside)
            return
        for start in range(0, len(rows), BATCH_ROWS):
            try:
                await self._send(rows[start : start + BATCH_ROWS])
            except Exception as error:  # noqa: BLE001  # the file stays; delivery is idempotent
                log.warning("spooled outcomes not acknowledged, kept: %s", error)
                return
        await asyncio.to_thread(self._spool.unlink, missing_ok=True)

    def _adopt_orphan(self) -> None:
        folder = self._spool.parent
        if self._set_aside is None:
            self._set_aside = sorted(folder.glob(f"*{SET_ASIDE}"))
        for orphan in (*folder.glob(f"*{self._spool.suffix}"), *self._set_aside):
            try:
                if self._spool.exists():
                    return
                if time.time() - orphan.stat().st_mtime > ORPHAN_S:
                    orphan.rename(self._spool)
                    self._set_aside = [path for path in self._set_aside if path != orphan]
            except FileNotFoundError:
                continue  # another process was faster


def read_spool(path: Path) -> list[Outcome]:
    """Outcomes of a spool file, also of an older program; unreadable lines are logged and ignored.

    A crash may have cut off the last line. Raises NewerRecordError at a line of a newer program.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            rows.append(OUTCOME.decode(line))
        except NewerRecordError:
            raise
        except KnowledgeError as error:
            log.warning("unreadable spool line ignored: %s", error.message)
    return rows
