"""Streams and events as upstreams send them, for the tests of this room."""

from __future__ import annotations

import json
from typing import Any

from calm_serve.upstreams.events import Event

DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}


def sse(document: Any, name: str = "") -> bytes:
    """One event; a byte string stands for itself."""
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


def event(document: Any, name: str = "") -> Event:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Event(sse(data, name), data, name.encode())


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chat chunk; `more` replaces its fields."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {
        "id": "up-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
        **more,
    }


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chat chunk with these fields in its delta."""
    return chunk(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


def completion(text: str = "", finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of completions."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {"id": "c", "object": "text_completion", "model": "m", "choices": [choice], **more}


def document(text: str | None = "an answer", **more: Any) -> dict[str, Any]:
    """A whole chat answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "up-1", "object": "chat.completion", "choices": [choice], "usage": USAGE, **more}


def messages_stream(*blocks: dict[str, Any], stop: str = "end_turn") -> list[Event]:
    """A stream of Anthropic; a block is {"start": content block, "deltas": [...]}."""
    usage = {"input_tokens": 9, "cache_read_input_tokens": 2, "output_tokens": 1}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude"}
    start: dict[str, Any] = {**message, "content": [], "stop_reason": None, "usage": usage}
    found = [{"type": "message_start", "message": start}, {"type": "ping"}]
    for index, block in enumerate(blocks):
        found.append(
            {"type": "content_block_start", "index": index, "content_block": block["start"]}
        )
        found += [
            {"type": "content_block_delta", "index": index, "delta": d} for d in block["deltas"]
        ]
        found.append({"type": "content_block_stop", "index": index})
    found.append(
        {
            "type": "message_delta",
            "delta": {"stop_reason": stop, "stop_sequence": None},
            "usage": {"output_tokens": 7},
        }
    )
    found.append({"type": "message_stop"})
    return [event(one, one["type"]) for one in found]
