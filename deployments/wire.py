"""Records between a router and an SLM deployment, as plain data.

An SLM method is an async generator. It yields `bytes` that the router sends to the client
unchanged, and then one `ReplyEnd`; for a request that fails before its first byte it yields one
`ErrorReply` instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from calm_serve.types import EngineFacts, QualitySignal

STREAM_END = b"data: [DONE]\n\n"  # the last event of a stream


class Hints(TypedDict, total=False):
    """Routing and validation hints that accompany a body; the engine does not get them."""

    decision_id: str
    prefix_family: str
    prefix_chain: tuple[int, ...]
    session_key: str
    adapter: str
    avoid: str  # replica of the failed attempt before this one
    validate: str  # name of the check that the client requested
    schema: dict[str, Any] | None
    labels: tuple[str, ...]
    residency_revision: int  # of the router's desired residency; absent without a memory budget


@dataclass(frozen=True, slots=True)
class ReplyEnd:
    """Last item of a reply. `payload` is a whole document, or the end of a stream."""

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
