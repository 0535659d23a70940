"""Warm-up: an engine's first requests, made before clients pay for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

from calm_serve.config import SLMSpec
from calm_serve.errors import ComponentError
from calm_serve.types import Task
from deployments.wire import served_name


async def warm_up(engine: Any, spec: SLMSpec) -> None:
    """Make the engine answer once in each way. Raises ComponentError when it cannot."""
    for stream in (False, True) if spec.task is Task.GENERATE else (False,):
        await _ask(engine, spec, spec.id, stream)
    for adapter in spec.adapters[:1]:
        # The first use of any adapter compiles kernels; do it now, not in a client's request.
        name = served_name(spec.id, adapter.name)
        await engine.load_adapter(name, adapter.path)
        await _ask(engine, spec, name, stream=False)
        await engine.unload_adapter(name)


async def _ask(engine: Any, spec: SLMSpec, model: str, stream: bool) -> None:
    path, body = _question(spec)
    body |= {"model": model, **({"stream": True} if stream else {})}
    status, answer = await post(engine.app, path, json.dumps(body).encode())
    if status != 200:
        raise ComponentError(f"{model!r} does not answer: {answer.decode(errors='replace')}")


def _question(spec: SLMSpec) -> tuple[str, dict[str, Any]]:
    text = "Warm up: list 3 words."
    if spec.task is Task.EMBED:
        return "/v1/embeddings", {"input": text}
    if spec.task is Task.RERANK:
        return "/v1/rerank", {"query": text, "documents": [text]}
    if not spec.capabilities.chat:
        return "/v1/completions", {"prompt": text, "max_tokens": 4}
    messages = [{"role": "user", "content": text}]
    return "/v1/chat/completions", {"messages": messages, "max_tokens": 4}


async def post(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    """POST to an ASGI application in this process; return status and body."""
    status, parts, sent = 0, [], False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # a client that stays; vLLM ends this wait
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"replica")],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return status, b"".join(parts)
