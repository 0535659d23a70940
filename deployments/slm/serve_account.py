"""Ray Serve's books for the requests that reach a replica on its own HTTP port.

Serve counts, bounds, times and drains what arrives through handles. A request that a router sends
to the replica's own port would be invisible to it. So this module enters each one in the books of
the replica that it runs in, exactly as Serve's own code does: the request takes one of
`max_ongoing_requests` slots, counts as ongoing for autoscaling and drain, and appears in Serve's
metrics and access log. Reason and alternatives with their numbers: decision 0037.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import ray
from ray.serve._private.common import RequestMetadata, RequestProtocol
from ray.serve._private.utils import generate_request_id

SetStatus = Callable[[str], None]


class FullError(Exception):
    """The replica has `max_ongoing_requests` requests, or is shutting down."""


class ServeAccount:
    """Enters requests in the books of the replica that this process is."""

    def __init__(self, app_name: str) -> None:
        """Find the replica; raises RuntimeError outside of one."""
        worker = ray._private.worker.global_worker
        actor = worker.actors.get(worker.actor_id)
        replica = getattr(actor, "_replica_impl", None)
        if replica is None:
            raise RuntimeError("this process is no Serve replica of the Ray version in use")
        self._replica: Any = replica
        self._app_name = app_name

    @property
    def ongoing(self) -> int:
        """Requests in this replica, as Serve counts them."""
        return int(self._replica.get_num_ongoing_requests())

    @contextlib.asynccontextmanager
    async def request(
        self, *, route: str, request_id: str, adapter: str
    ) -> AsyncIterator[SetStatus]:
        """Hold a slot for one request; yields a function that takes its HTTP status.

        Raises FullError, at once, when there is no slot.
        """
        metadata = RequestMetadata(
            request_id=request_id or generate_request_id(),
            internal_request_id=generate_request_id(),
            call_method="http",
            route=route,
            app_name=self._app_name,
            multiplexed_model_id=adapter,
            is_streaming=True,
            _request_protocol=RequestProtocol.HTTP,
            _http_method="POST",
        )
        if not self._replica._can_accept_request(metadata):
            raise FullError
        if self._replica._event_loop is asyncio.get_running_loop():
            with self._replica._wrap_request(metadata) as set_status:
                async with self._replica._start_request(metadata):
                    yield set_status
            return
        # Serve's loop is another thread's; its semaphore and counters belong to that thread.
        caller = asyncio.get_running_loop()
        entered: asyncio.Future[SetStatus] = caller.create_future()
        left = asyncio.Event()
        serve_loop: asyncio.AbstractEventLoop = self._replica._event_loop
        asyncio.run_coroutine_threadsafe(self._hold(metadata, caller, entered, left), serve_loop)
        try:
            yield await entered
        finally:
            serve_loop.call_soon_threadsafe(left.set)

    async def _hold(
        self,
        metadata: RequestMetadata,
        caller: asyncio.AbstractEventLoop,
        entered: asyncio.Future[SetStatus],
        left: asyncio.Event,
    ) -> None:
        with self._replica._wrap_request(metadata) as set_status:
            async with self._replica._start_request(metadata):
                caller.call_soon_threadsafe(_resolve, entered, set_status)
                await left.wait()


def _resolve(future: asyncio.Future[SetStatus], value: SetStatus) -> None:
    if not future.done():
        future.set_result(value)
