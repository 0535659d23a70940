"""Failures of upstreams: of which kind one is, and what follows from each kind.

`CONSEQUENCES` is the only place that says whether another SLM is tried, whether the circuit breaker
counts the failure, and what the client is told. A client must not be able to open a breaker, so
only kinds that no request's content can cause are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from calm_serve.errors import (
    AsleepError,
    CalmError,
    CapacityError,
    NoCandidateError,
    RequestError,
    RouterFullError,
    SLMUnavailableError,
    UnknownModelError,
    openai_error,
)

# A provider's daily limit names hours; one request each ten minutes finds out if it was raised.
MAX_COOL_DOWN_S = 600.0
MIN_COOL_DOWN_S = 0.1  # "Retry-After: 0" would ask again at once


POISON = "the engine stopped while it worked on this request, and so did another one before"


class FailureKind(StrEnum):
    """Why an SLM did not answer a request."""

    INVALID_REQUEST = "invalid_request"  # no SLM could take it: the client's mistake
    TOO_LONG = "too_long"  # for this SLM's context
    UNSUPPORTED = "unsupported"  # this SLM lacks something: tools, images, a parameter
    FULL = "full"  # its queue, or the whole upstream is overloaded
    RATE_LIMITED = "rate_limited"  # our key's limit
    TRANSPORT = "transport"  # no connection, or it broke
    TIMED_OUT = "timed_out"  # to connect, to begin, or between two events
    OUT_OF_TIME = "out_of_time"  # the request's own limit passed while the SLM worked
    ENGINE_DIED = "engine_died"
    POISON = "poison"  # the request is what killed two engines
    SERVER_ERROR = "server_error"  # the upstream says so (5xx)
    MISCONFIGURED = "misconfigured"  # key, URL, model name or account; the operator's to cure
    BAD_ANSWER = "bad_answer"  # HTML, an error inside a 200, no end
    EMPTY_ANSWER = "empty_answer"


@dataclass(frozen=True, slots=True)
class Consequence:
    """What follows from one kind of failure."""

    http_status: int  # for the client, if no other SLM answers
    code: str  # OpenAI's `error.code`, likewise
    error_type: str = "server_error"
    next_slm: bool = True  # another SLM may answer
    breaker: bool = False  # it speaks against the SLM
    cool_down_s: float | None = None  # if the upstream names none; None: it gets requests again
    alarm: bool = False  # an operator must act
    upstream_status: bool = False  # the upstream's own 4xx and code say more
    repeat: bool = True  # the client may send it again
    deliver: bool = False  # if no other SLM answers, the answer itself is given to the client


_INVALID = "invalid_request_error"
_UNAVAILABLE = "service_unavailable"
CONSEQUENCES: dict[FailureKind, Consequence] = {
    FailureKind.INVALID_REQUEST: Consequence(
        400, "invalid_request", _INVALID, next_slm=False, upstream_status=True
    ),
    FailureKind.TOO_LONG: Consequence(400, "context_length_exceeded", _INVALID),
    FailureKind.UNSUPPORTED: Consequence(
        400, "unsupported_parameter", _INVALID, upstream_status=True
    ),
    FailureKind.FULL: Consequence(429, "fleet_saturated", "rate_limit_error"),
    FailureKind.RATE_LIMITED: Consequence(
        429, "rate_limit_exceeded", "rate_limit_error", cool_down_s=1.0
    ),
    FailureKind.TRANSPORT: Consequence(503, "model_unavailable", _UNAVAILABLE, breaker=True),
    FailureKind.TIMED_OUT: Consequence(504, "model_timeout", "timeout_error", breaker=True),
    # A client can ask for more than fits its time.
    FailureKind.OUT_OF_TIME: Consequence(504, "request_timeout", "timeout_error", next_slm=False),
    FailureKind.ENGINE_DIED: Consequence(503, "model_unavailable", _UNAVAILABLE, breaker=True),
    FailureKind.POISON: Consequence(500, "request_stopped_engine", next_slm=False, repeat=False),
    FailureKind.SERVER_ERROR: Consequence(502, "upstream_error", breaker=True),
    # Every request would wait for one answer of an upstream that takes none; 30 s after the
    # operator's cure it is asked again.
    FailureKind.MISCONFIGURED: Consequence(
        502, "upstream_misconfigured", cool_down_s=30.0, alarm=True
    ),
    FailureKind.BAD_ANSWER: Consequence(502, "upstream_bad_answer", breaker=True),
    # A prompt can ask for it, so no breaker; and it is an answer, if the only one.
    FailureKind.EMPTY_ANSWER: Consequence(502, "upstream_empty_answer", deliver=True),
}


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt. `message` is fit for the client: without keys, hosts and names."""

    kind: FailureKind
    message: str
    param: str | None = None  # field of the request that is at fault
    code: str | None = None  # the upstream's, where its status is passed on
    upstream_status: int = 0  # 0: it did not answer
    retry_after_s: float | None = None  # as the upstream named it; at most MAX_COOL_DOWN_S
    died_beside: int | None = None  # other requests in the engine that died with this one in it

    @property
    def consequence(self) -> Consequence:
        """What follows from its kind."""
        return CONSEQUENCES[self.kind]

    @property
    def cool_down_s(self) -> float | None:
        """Seconds for which the SLM should get no request; None for none."""
        if self.kind in (FailureKind.RATE_LIMITED, FailureKind.FULL):
            return self.retry_after_s or self.consequence.cool_down_s
        return self.consequence.cool_down_s

    @property
    def http_status(self) -> int:
        """For the client, if no other SLM answers."""
        passed_on = self.consequence.upstream_status and 400 <= self.upstream_status < 500
        return self.upstream_status if passed_on else self.consequence.http_status

    def headers(self) -> dict[str, str]:
        """Return the client's headers: `retry-after` in whole seconds, rounded up.

        OpenAI's and Anthropic's SDKs repeat every 5xx that does not say `x-should-retry: false`.
        """
        if not self.consequence.repeat:
            return {"x-should-retry": "false"}
        wait_s = self.cool_down_s
        if wait_s is None or self.http_status not in (429, 503):
            return {}
        return {"retry-after": str(math.ceil(wait_s))}

    def to_openai(self) -> dict[str, Any]:
        """Return OpenAI's error body."""
        code = self.code if self.consequence.upstream_status and self.code else None
        return openai_error(
            self.message, self.consequence.error_type, self.param, code or self.consequence.code
        )

    def to_anthropic(self) -> dict[str, Any]:
        """Return Anthropic's error body, for clients of `/v1/messages`."""
        kind = _ANTHROPIC_TYPES.get(self.http_status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


_ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class UpstreamError(CalmError):
    """An attempt failed; `failure` says what follows."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, param=failure.param)
        self.failure = failure

    @property
    def http_status(self) -> int:  # type: ignore[override]  # known per failure, not per class
        """As the failure's."""
        return self.failure.http_status

    def to_openai(self) -> dict[str, Any]:
        """Return OpenAI's error body."""
        return self.failure.to_openai()

    def to_anthropic(self) -> dict[str, Any]:
        """Return Anthropic's error body."""
        return self.failure.to_anthropic()


# Kinds of errors that are no upstream's; the more special ones first.
_KINDS: dict[type[CalmError], str] = {
    AsleepError: "asleep",
    RouterFullError: "router_full",
    CapacityError: FailureKind.FULL,
    SLMUnavailableError: "no_slm",
    NoCandidateError: "no_capable_slm",
    UnknownModelError: "unknown_model",
    RequestError: "bad_request",
}
FAILURE_KINDS = frozenset((*FailureKind, *_KINDS.values(), "internal"))


def unsupported(slm_id: str, name: str) -> UpstreamError:
    """Return the error for a field that the upstream of `slm_id` does not have."""
    message = f"{name!r} is not supported by the upstream of {slm_id!r}"
    return UpstreamError(Failure(FailureKind.UNSUPPORTED, message, param=name))


def failure_kind(error: CalmError) -> str:
    """Return the kind of an error, for metrics and outcomes."""
    if isinstance(error, UpstreamError):
        return error.failure.kind
    return next((kind for known, kind in _KINDS.items() if isinstance(error, known)), "internal")


def engine_death(slm_id: str, *, was_running: bool, others: int, deaths: int) -> Failure:
    """Judge a request that saw an engine die.

    An engine may be killed from outside (out of memory, an operator), whatever it works on. So a
    request may go to one second engine. It is poison, so that no further engine gets it, when an
    engine has died with it before.

    Args:
        slm_id: the engine's SLM.
        was_running: the engine had taken the request when it died.
        others: requests that were running in the engine beside it.
        deaths: engines that died with this request before this one, or lately while they worked
            on an equal request alone.
    """
    if not was_running:
        return Failure(FailureKind.ENGINE_DIED, f"the engine of {slm_id!r} has stopped")
    if deaths > 0:
        return Failure(FailureKind.POISON, POISON, died_beside=others)
    message = f"the engine of {slm_id!r} stopped while it worked on this request"
    return Failure(FailureKind.ENGINE_DIED, message, died_beside=others)


def known_poison() -> UpstreamError:
    """Return the error for a request that is not sent, because engines died with it lately."""
    return UpstreamError(Failure(FailureKind.POISON, POISON))
