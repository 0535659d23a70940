"""What travels between a router and an SLM deployment: one small vocabulary, plain data.

An SLM method is an async generator. It yields `bytes` that go to the client as they are, and ends
with one `ReplyEnd`; a request that fails before its first byte yields one `ErrorReply` instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from calm_serve.types import EngineFacts, QualitySignal

STREAM_END = b"data: [DONE]\n\n"  # the last event of a stream


class Hints(TypedDict, total=False):
    """Routing and validation hints that accompany a body; the engine never sees them."""

    decision_id: str
    prefix_family: str
    prefix_chain: tuple[int, ...]
    session_key: str
    adapter: str
    avoid: str  # replica that the failed attempt before this one was meant for
    validate: str  # check that the client asked for
    schema: dict[str, Any] | None
    labels: tuple[str, ...]
    residency_revision: int  # of the router's desired residency; absent without a memory budget


@dataclass(frozen=True, slots=True)
class ReplyEnd:
    """Last item of an answer. `payload` is a whole document, or the end of a stream."""

    payload: bytes
    facts: EngineFacts
    signals: tuple[QualitySignal, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """The request failed before its first byte."""

    http_status: int
    body: bytes  # OpenAI's error document
    asleep: bool = False  # the router did not know yet that the SLM sleeps: it queues the request
    dead_replica: str = ""  # id of the replica that sent this, when its engine has died


def deployment_name(slm_id: str) -> str:
    """Name of an SLM's Serve deployment."""
    return f"slm-{slm_id}"
