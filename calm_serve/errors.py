"""Every error this project raises on purpose, and what the caller may do about it.

CalmError
├── ConfigError               the operator's input is wrong; nothing was started
├── RequestError              the client's input is wrong (4xx); retrying does not help
│   ├── UnknownModelError     404
│   └── NoCandidateError      400: every SLM was excluded by a hard filter
│       └── ContextLengthError    the request is longer than every context
├── CapacityError             429 or 503 with Retry-After; retrying later helps
│   ├── RouterFullError       429: the router works on as many requests as it may
│   └── AsleepError           503: the SLM will not be awake in time
├── PackagedModelError        weights cannot be fetched or are not those expected; nothing is kept
├── ComponentError            a component is dead; the caller cannot restart it
│   ├── SLMUnavailableError   503: no replica of the chosen SLM answers
│   └── KnowledgeError        the knowledge store or actor does not answer; decisions go on
└── UpstreamError             one attempt failed (room `upstreams`); its `failure` says what follows
"""

from __future__ import annotations

from typing import Any


class CalmError(Exception):
    """Base of all errors; `to_openai` and `to_anthropic` give the error formats of both APIs."""

    http_status = 500
    error_type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def to_openai(self) -> dict[str, Any]:
        """Return the body `{"error": {"message", "type", "param", "code"}}`."""
        return openai_error(self.message, self.error_type, self.param, self.code)

    def to_anthropic(self) -> dict[str, Any]:
        """Return the body `{"type": "error", "error": {"type", "message"}}`."""
        return anthropic_error(self.message, self.http_status)


class ConfigError(CalmError):
    """The configuration is wrong; the message names the field."""


class PackagedModelError(CalmError):
    """A packaged model cannot be fetched, or its weights are not those expected."""


class RequestError(CalmError):
    """The request is wrong."""

    http_status = 400
    error_type = "invalid_request_error"


class UnknownModelError(RequestError):
    """The request names a model that the fleet does not have."""

    http_status = 404
    code = "model_not_found"


class NoCandidateError(RequestError):
    """Hard filters exclude every SLM; the message lists each SLM's reason."""

    code = "no_capable_model"


class ContextLengthError(NoCandidateError):
    """The request is longer than the context of every SLM that could take it otherwise."""

    code = "context_length_exceeded"


class CapacityError(CalmError):
    """The fleet is full; `retry_after_s` is computed from the queue."""

    http_status = 429
    error_type = "rate_limit_error"
    code = "fleet_saturated"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RouterFullError(CapacityError):
    """The router works on as many requests as it may; nothing was decided."""

    code = "router_saturated"


class AsleepError(CapacityError):
    """The SLM is not awake in time; `retry_after_s` is the planner's estimate."""

    http_status = 503
    error_type = "service_unavailable"
    code = "model_asleep"


class ComponentError(CalmError):
    """A component is dead."""

    http_status = 503
    error_type = "service_unavailable"


class SLMUnavailableError(ComponentError):
    """No replica of the SLM answered before the first byte."""

    code = "model_unavailable"


class KnowledgeError(ComponentError):
    """The knowledge store or actor does not answer."""

    code = "knowledge_unavailable"


class NewerRecordError(KnowledgeError):
    """A record was written by a newer program, so that the meaning of its fields is unknown."""


def openai_error(
    message: str, error_type: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error body."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


# Anthropic's error types by HTTP status; other 4xx are invalid requests, other 5xx API errors.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def anthropic_error(message: str, http_status: int) -> dict[str, Any]:
    """Return Anthropic's error body. It has no field for the parameter: the message names it.

    >>> anthropic_error("'max_tokens' is missing", 400)["error"]["type"]
    'invalid_request_error'
    """
    other = "invalid_request_error" if http_status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(http_status, other)
    return {"type": "error", "error": {"type": kind, "message": message}}
