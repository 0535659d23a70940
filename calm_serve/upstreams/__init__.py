"""Upstreams: what goes to an SLM over HTTP and what comes back. Owner: router. Never blocks.

Takes bodies and bytes, gives requests, events and judgements. Sends nothing itself: the transport,
its timeouts and its connections are `deployments/router`'s.
"""

from calm_serve.upstreams.answers import (
    END_EVENTS,
    Answer,
    StreamReader,
    may_be_empty,
    read_answer,
    wrong_content_type,
)
from calm_serve.upstreams.anthropic import ChatStream, chat_answer
from calm_serve.upstreams.dialects import UpstreamRequest, build_request, encoded
from calm_serve.upstreams.engine_deaths import POISON_DEATHS, EngineDeaths
from calm_serve.upstreams.error_documents import (
    Origin,
    classify_error,
    classify_response,
    context_length_message,
    sanitised,
)
from calm_serve.upstreams.events import Event, EventScanner, EventTooLargeError
from calm_serve.upstreams.failures import (
    CONSEQUENCES,
    FAILURE_KINDS,
    Consequence,
    Failure,
    FailureKind,
    UpstreamError,
    engine_death,
    failure_kind,
    known_poison,
)
from calm_serve.upstreams.kinds import Api, EventKind
from calm_serve.upstreams.usage import Usage, cost, usage_of

__all__ = [
    "CONSEQUENCES",
    "END_EVENTS",
    "FAILURE_KINDS",
    "POISON_DEATHS",
    "Answer",
    "Api",
    "ChatStream",
    "Consequence",
    "EngineDeaths",
    "Event",
    "EventKind",
    "EventScanner",
    "EventTooLargeError",
    "Failure",
    "FailureKind",
    "Origin",
    "StreamReader",
    "UpstreamError",
    "UpstreamRequest",
    "Usage",
    "build_request",
    "chat_answer",
    "classify_error",
    "classify_response",
    "context_length_message",
    "cost",
    "encoded",
    "engine_death",
    "failure_kind",
    "known_poison",
    "may_be_empty",
    "read_answer",
    "sanitised",
    "usage_of",
    "wrong_content_type",
]
