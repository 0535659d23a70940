"""Requests that wait for a slot of an SLM."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

SLOT_POLL_S = 0.05  # between two attempts of the first in a queue


class SlotQueue:
    """Requests of one SLM that wait because all its replicas are full, first come first served."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self) -> None:
        """Wait until it is this request's turn to try again.

        A slot that another router's request frees is not seen here, hence the time limit.
        """
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=SLOT_POLL_S)
                if self._waiting and self._waiting[0] is turn:
                    return
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)
            if turn.cancelled():
                self.next()

    def next(self) -> None:
        """Give the first one its turn."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
