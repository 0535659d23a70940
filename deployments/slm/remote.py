"""A remote SLM: any OpenAI-compatible upstream behind the same deployment interface."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx
from ray import serve

from calm_serve.config import SLMSpec
from calm_serve.errors import openai_error
from calm_serve.types import EngineFacts
from deployments.slm.state_reporter import StateReporter
from deployments.wire import ErrorReply, Hints, ReplyEnd

MAX_TOKENS = 10_000_000  # of a prompt or an answer; no context is longer


class RemoteSLM:
    """Forwards bodies and bytes; takes token counts from the upstream's usage."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self,
        spec: SLMSpec,
        app_name: str,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Open the client and report "ready"; `transport` replaces the network in tests.

        Raises ValueError when the SLM is not remote.
        """
        if spec.remote is None:
            raise ValueError(f"SLM {spec.id!r} is not remote")
        context = serve.get_replica_context()
        self._spec = spec
        self._replica_id = context.replica_id.unique_id
        key = os.environ.get(spec.remote.api_key_env, "") if spec.remote.api_key_env else ""
        self._client = httpx.AsyncClient(
            base_url=spec.remote.base_url.rstrip("/") + "/",
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=spec.remote.timeout_s,
            transport=transport,
        )
        self._running = 0
        StateReporter(app_name, spec.id, self._replica_id).report("ready", {"total": 0.0})

    async def chat(self, body: dict[str, Any], hints: Hints | None = None) -> AsyncIterator[Any]:
        """Forward a `/v1/chat/completions` body; see `wire` for what is yielded.

        Raises httpx.HTTPError when the upstream fails after a stream's first byte; any earlier
        failure is an ErrorReply.
        """
        del hints
        async with aclosing(self._forward("chat/completions", body)) as items:
            async for item in items:
                yield item

    async def complete(
        self, body: dict[str, Any], hints: Hints | None = None
    ) -> AsyncIterator[Any]:
        """Forward a `/v1/completions` body; yields and raises as `chat`."""
        del hints
        async with aclosing(self._forward("completions", body)) as items:
            async for item in items:
                yield item

    async def _forward(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        started, first, tail = time.perf_counter(), 0.0, b""
        stream, last = bool(body.get("stream")), b""
        self._running += 1
        try:
            upstream = {**body, "model": self._spec.model}
            async with self._client.stream("POST", path, json=upstream) as response:
                if response.status_code in (401, 403):
                    # The upstream did not accept our key; the client cannot change that.
                    yield self._upstream_failed(f"refused our key ({response.status_code})")
                    return
                if response.status_code >= 400:
                    yield ErrorReply(response.status_code, await response.aread())
                    return
                async for chunk in response.aiter_bytes():
                    first = first or time.perf_counter() - started
                    tail = (tail + chunk)[-8192:]
                    if stream and not chunk.endswith(b"data: [DONE]\n\n"):
                        yield chunk
                    else:
                        last += chunk
        except httpx.HTTPError as error:
            if stream and first:
                raise  # the client has bytes already, so the router ends the stream with an error
            yield self._upstream_failed(type(error).__name__)
            return
        finally:
            self._running -= 1
        prompt, output = usage_of(tail)
        facts = EngineFacts(
            replica_id=self._replica_id,
            prompt_tokens=prompt,
            output_tokens=output,
            ttft_s=first,
            energy_j=output * self._spec.priors.energy_j_per_token,
            running=self._running,
        )
        yield ReplyEnd(last, facts)

    def _upstream_failed(self, why: str) -> ErrorReply:
        message = f"upstream of {self._spec.id!r}: {why}"
        return ErrorReply(502, json.dumps(openai_error(message, "server_error")).encode())

    def record_routing_stats(self) -> dict[str, Any]:
        """Polled by Serve."""
        return {"running": self._running, "waiting": 0}


def usage_of(tail: bytes) -> tuple[int, int]:
    """(prompt tokens, output tokens) from the end of an answer; zeros when it has none."""
    start = tail.rfind(b'"usage"')
    brace = tail.find(b"{", start)
    if start < 0 or brace < 0:
        return 0, 0
    try:
        usage, _ = json.JSONDecoder().raw_decode(tail[brace:].decode("utf-8", "replace"))
    except (ValueError, RecursionError):  # no JSON, or a number of too many digits
        return 0, 0
    return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))


def _count(value: Any) -> int:
    """A token count; 0 for what cannot be one, because the upstream is not trusted."""
    return value if type(value) is int and 0 < value <= MAX_TOKENS else 0
