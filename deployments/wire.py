"""What a router and an SLM replica say to each other over HTTP.

The router POSTs the client's body to a replica's own port. Request headers: the replica's secret,
and an `AnswerRequest`. The answer is the engine's, byte by byte. What only the replica knows comes
as an `AnswerEnd`: in a header of a whole document, or as the last event of a stream, which the
router takes off.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypedDict

from calm_serve.types import EngineFacts, QualitySignal

SECRET_HEADER = "x-calm-secret"
REQUEST_HEADER = "x-calm-request"  # an `AnswerRequest`
END_HEADER = "x-calm-end"  # an `AnswerEnd`
NO_ANSWER_HEADER = "x-calm-no-answer"  # a `NoAnswer`
ONGOING_HEADER = "x-calm-ongoing"  # requests in the replica
# Begins a line of its own in the stream, a comment that clients would ignore. No answer contains
# such a line: line breaks in JSON are escaped.
END_EVENT = b": calm.end "


class NoAnswer(StrEnum):
    """Why a replica gives no answer."""

    FULL = "full"
    ASLEEP = "asleep"  # the router did not know yet that the SLM sleeps: it queues the request
    DEAD = "dead"  # its engine died while it worked on the request
    GONE = "gone"  # its engine had died before


class Hints(TypedDict, total=False):
    """What the way to a replica depends on."""

    decision_id: str
    prefix_family: str
    prefix_chain: tuple[int, ...]
    prompt_tokens: int  # estimated
    session_key: str
    adapter: str
    avoid: str  # replica of the failed attempt before this one
    first_byte_limit_s: float  # of a stream, once it is sent to a replica
    engine_deaths: int  # engines that died with this request, or alone with an equal one
    wait_limit_s: float  # longest wait for a slot after which the answer is still of use


class ReplicaAddress(TypedDict):
    """Where a replica listens; Serve hands it to the handles (`record_replica_metadata`)."""

    url: str
    secret: str


@dataclass(frozen=True, slots=True)
class ReplyEnd:
    """Last item of a reply. `payload` is a whole document, or the end of a stream."""

    payload: bytes
    facts: EngineFacts
    signals: tuple[QualitySignal, ...] = ()


class AsleepReply:
    """The only item of a reply: the SLM sleeps, which the router did not know yet."""


def deployment_name(slm_id: str) -> str:
    """Name of an SLM's Serve deployment."""
    return f"slm-{slm_id}"


def served_name(slm_id: str, adapter: str) -> str:
    """Name by which an SLM's engine knows itself or one of its adapters."""
    return f"{slm_id}:{adapter}" if adapter else slm_id


def address_of(metadata: dict[str, Any]) -> ReplicaAddress | None:
    """Return the address in a replica's metadata; None when there is none."""
    url, secret = metadata.get("url"), metadata.get("secret")
    if isinstance(url, str) and isinstance(secret, str):
        return ReplicaAddress(url=url, secret=secret)
    return None
