"""The connections of one router process to the SLMs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from weakref import WeakSet

import aiohttp
from pydantic_core import to_json

from calm_serve.config import SLMSpec
from calm_serve.protocol.answers import AnswerRequest
from deployments.router.upstream.local import LocalReply
from deployments.router.upstream.remote import RemoteReply
from deployments.router.upstream.slot_queue import SlotQueue
from deployments.wire import Hints, served_name

CONNECT_TIMEOUT_S = 1.0  # a replica that is alive accepts in milliseconds
FAILED_GRACE_S = 2.0  # for a failed replica to end its replies itself, which takes milliseconds
READ_BUFFER_BYTES = 1 << 18
KEEP_ALIVE_S = 60.0
MAX_HEADER_BYTES = 1 << 16  # facts and signals of a whole document


class Upstream:
    """Connections of one router process to all replicas and remote SLMs.

    Args:
        spec: SLM id -> the SLM.
        start_replica: SLM -> waits until a replica of an SLM without any has started; None for an
            SLM that always has replicas.
        clock: monotonic seconds.
        random: numbers in [0, 1).
    """

    def __init__(
        self,
        spec: Callable[[str], SLMSpec],
        start_replica: Callable[[str], Awaitable[object] | None],
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self.spec, self.start_replica = spec, start_replica
        self._clock, self._random = clock, random
        self.running: Counter[str] = Counter()  # requests in remote SLMs
        self._working: dict[str, WeakSet[LocalReply]] = {}  # by the replica that works on them
        self._queues: dict[str, SlotQueue] = {}  # one per SLM that ever was in the fleet
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            max_field_size=MAX_HEADER_BYTES,
        )

    def call(
        self, slm_id: str, path: str, body: Mapping[str, Any], asked: AnswerRequest, hints: Hints
    ) -> AsyncIterator[Any]:
        """Return the reply of an SLM, which sends the request when its first item is read."""
        spec = self.spec(slm_id)
        if spec.remote is not None:
            return RemoteReply(self, spec, spec.remote, path, body)
        named = {**body, "model": served_name(slm_id, asked.adapter)}
        return LocalReply(self, spec, path, to_json(named), asked, hints)

    def queue(self, slm: SLMSpec) -> SlotQueue:
        """Return the requests that wait for a slot of an SLM."""
        queue = self._queues.get(slm.id)
        if queue is None:
            priors = slm.priors
            queue = self._queues[slm.id] = SlotQueue(
                slm.id,
                slm.limits.max_queued_requests,
                priors.ttft_s + priors.tpot_s * priors.output_tokens,
                self._clock,
                self._random,
            )
        return queue

    def begun(self, replica_id: str, reply: LocalReply) -> None:
        """Note that a replica works on a reply."""
        self._working.setdefault(replica_id, WeakSet()).add(reply)

    def ended(self, replica_id: str, reply: LocalReply) -> None:
        """Note that a replica works on a reply no more."""
        working = self._working.get(replica_id)
        if working is not None:
            working.discard(reply)
            if not working:
                del self._working[replica_id]

    def replica_failed(self, replica_id: str) -> None:
        """Break off the replies of a replica that reported that its engine is dead or hangs.

        It ends them itself when it can, and then knows more of each.
        """
        if replica_id in self._working:
            asyncio.get_running_loop().call_later(FAILED_GRACE_S, self._break_off, replica_id)

    def _break_off(self, replica_id: str) -> None:
        replies = list(self._working.get(replica_id, ()))
        for reply in replies:
            reply.break_off(others=len(replies) - 1)

    async def post(
        self,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> aiohttp.ClientResponse:
        """Send a request; return as soon as the answer's headers are here."""
        return await self._session.post(
            url,
            data=body,
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
