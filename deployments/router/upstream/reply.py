"""What all replies have in common: how they are read, broken off and counted once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from calm_serve.upstreams import EventTooLargeError, Failure, UpstreamError


class Reply(ABC):
    """An SLM's reply as items; reading the first one sends the request.

    However reading ends (the last item, a failure, a cancellation, a reader that drops the reply),
    the connection is released and the request is counted as over, once.
    """

    # Until `__init__` has run to its end there is nothing to give back.
    _over = True

    def __init__(self) -> None:
        self._response: aiohttp.ClientResponse | None = None
        self._over = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._over:
            raise StopAsyncIteration
        done = False
        try:
            if self._response is None:
                item = await self._open()
            else:
                item = await self._next_part(self._response)
            done = True
            return item
        except (aiohttp.ClientError, OSError, EventTooLargeError) as error:
            raise UpstreamError(self._failure_of(error)) from error
        finally:
            if not done:
                self.cancel()

    def __del__(self) -> None:
        # A client may leave between the opening of a stream and its first part.
        self.cancel()

    def cancel(self) -> None:
        """Break off: close the connection, which ends the work behind it."""
        if self._over:
            return
        if self._response is not None:
            self._response.close()
        self._finish()

    def _finish(self) -> None:
        """Count the request as over, once."""
        if not self._over:
            self._over = True
            self._count_end()

    @abstractmethod
    async def _open(self) -> Any:
        """Send the request and return the first item."""

    @abstractmethod
    async def _next_part(self, response: aiohttp.ClientResponse) -> Any:
        """Return the next item."""

    @abstractmethod
    def _failure_of(self, error: Exception) -> Failure:
        """Judge an error of the connection; a TimeoutError is one."""

    @abstractmethod
    def _count_end(self) -> None:
        """Give back what the request holds."""
