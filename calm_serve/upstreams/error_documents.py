"""Error documents: what an upstream says of a failure, and of which kind it is.

Read are vLLM's, OpenAI's, Azure's, Anthropic's, OpenRouter's and Google's documents, those of web
frameworks, and the HTML of proxies. Status and codes decide first; words only where upstreams have
no code for it.
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from calm_serve.upstreams.failures import (
    MAX_COOL_DOWN_S,
    MIN_COOL_DOWN_S,
    Failure,
    FailureKind,
)
from calm_serve.upstreams.kinds import Document, parse_object

MAX_ERROR_BYTES = 64 << 10  # of a body that is read; validation errors repeat the request
MAX_MESSAGE_CHARS = 1000
_UNPROCESSABLE = 422


@dataclass(frozen=True, slots=True)
class ErrorDocument:
    """An upstream's own words; not yet fit for a client."""

    message: str = ""
    type: str = ""
    code: str = ""
    param: str | None = None
    raw: str = ""  # what a provider behind the upstream said


@dataclass(frozen=True, slots=True)
class Origin:
    """Which upstream a document came from."""

    slm_id: str
    local: bool  # one of our engines: what it calls a bad request is the client's
    context_tokens: int = 0  # of the SLM; 0: not known


def classify_response(
    status: int, headers: Mapping[str, str], body: bytes, origin: Origin, now_s: float
) -> Failure:
    """Return the failure that an answer other than 2xx means.

    Args:
        status: HTTP status.
        headers: by lower-case name.
        body: as it came; what is beyond MAX_ERROR_BYTES is not read.
        origin: where it came from.
        now_s: wall clock in Unix seconds, for dates in Retry-After.
    """
    error = read_error(parse_object(body[:MAX_ERROR_BYTES]) or _from_list(body[:MAX_ERROR_BYTES]))
    kind = _kind(status, error, origin, "retry-after" in headers)
    return _failure(kind, status, error, origin, retry_after_s(headers, error.message, now_s))


def classify_error(document: Document | None, origin: Origin) -> Failure:
    """Return the failure that an error inside a 200 means; None is no document at all."""
    error = read_error(document)
    status = int(error.code) if error.code.isdecimal() and len(error.code) == 3 else 0
    status = status or _STATUS_OF_TYPE.get(error.type, 0) or _STATUS_OF_TYPE.get(error.code, 0)
    if not 400 <= status < 600:
        return _failure(FailureKind.BAD_ANSWER, 0, error, origin, None)
    kind = _kind(status, error, origin, retry_named=False)
    return _failure(kind, status, error, origin, retry_after_s({}, error.message, 0.0))


def read_error(document: Document | None) -> ErrorDocument:
    """Return an error document's parts, whoever wrote it."""
    if document is None:
        return ErrorDocument()
    response = document.get("response")  # Responses: the event response.failed
    if isinstance(response, Mapping) and isinstance(response.get("error"), Mapping):
        document = response
    error = document.get("error")
    choices = document.get("choices")
    if not error and isinstance(choices, list):
        error = next((c["error"] for c in choices if isinstance(c, Mapping) and c.get("error")), {})
    if not isinstance(error, Mapping):
        error = {**document, "message": error} if isinstance(error, str) else document
    inner = error.get("innererror")
    metadata = error.get("metadata")
    param = error.get("param")
    codes = [error.get("code"), inner.get("code") if isinstance(inner, Mapping) else None]
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return ErrorDocument(
        message=_text(error.get("message") or error.get("detail") or error.get("title")),
        type=_text(error.get("type") or error.get("status")),
        code=" ".join(_text(code) for code in codes if code),
        # vLLM's server says where in the HTTP request: "body.temperature".
        param=param.removeprefix("body.")[:200] if isinstance(param, str) else None,
        raw=_text(raw),
    )


def retry_after_s(headers: Mapping[str, str], message: str, now_s: float) -> float | None:
    """Return the seconds that an upstream asks to wait, bounded; None when it names none."""
    if (wait_s := _number(headers.get("retry-after-ms"))) is not None:
        return _bounded(wait_s / 1000.0)
    value = headers.get("retry-after", "").strip()
    if (wait_s := _number(value)) is not None:
        return _bounded(wait_s)
    if value and (at_s := _date(value)) is not None:
        return _bounded(at_s - now_s)
    resets = [v for n, v in headers.items() if _RESET_HEADER.fullmatch(n)]
    waits = [at - now_s for v in resets if (at := _date(v)) is not None]
    if waits:  # Anthropic: a date for each limit, and only those in the future are exhausted
        return _bounded(max(waits))
    if found := _TRY_AGAIN.search(message):
        return _bounded(float(found[1]) / (1000.0 if found[2] == "ms" else 1.0))
    return None


def sanitised(message: str, secrets: Iterable[str] = ()) -> str:
    """Return a message that may go to a client: without keys, organisations, hosts and paths.

    Args:
        message: an upstream's words.
        secrets: exact strings that must not appear, such as the key that was sent.
    """
    for secret in secrets:
        if secret:
            message = message.replace(secret, "[redacted]")
    message = message[: 2 * MAX_MESSAGE_CHARS]
    for pattern, put in _REDACTED:
        message = pattern.sub(put, message)
    message = _CONTROL.sub(" ", message).strip()
    cut = len(message) > MAX_MESSAGE_CHARS
    return message[: MAX_MESSAGE_CHARS - 3] + "..." if cut else message


def context_length_message(context_tokens: int, requested_tokens: int) -> str:
    """Return vLLM's sentence, which agents and gateways look for; 0 is not known.

    LangChain, and every client of Anthropic's API, look for "prompt is too long", which ends it.
    """
    limit = f" {context_tokens} tokens" if context_tokens else " smaller"
    asked = (
        f"you requested {requested_tokens} tokens" if requested_tokens else "your request is longer"
    )
    return (
        f"This model's maximum context length is{limit}. However, {asked}. "
        "Please reduce the length of the messages or completion: the prompt is too long."
    )


_RESET_HEADER = re.compile(r"anthropic-ratelimit-[a-z-]+-reset")
_TRY_AGAIN = re.compile(
    r"(?:try again|retry) (?:in|after) (\d{1,6}(?:\.\d{1,6})?) ?(ms|s\b|sec)", re.IGNORECASE
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_REDACTED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), put)
    for pattern, put in (
        (r"\bbearer\s+\S+", "[redacted]"),
        # Providers show keys with stars in the middle.
        (
            r"\b(?:sk|pk|rk|gsk|xai|org|proj|user|key|hf)[-_](?=[\w*-]{0,99}[\d*])[\w*-]{6,}"
            r"|\b(?:AIza|AKIA|eyJ)[\w-]{12,}",
            "[redacted]",
        ),
        (r"[a-z][a-z0-9+.-]{1,20}://[^\s\"'<>)\]]+", "[url]"),
        (r"\b[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{2,64}", "[redacted]"),
        (r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?\b", "[host]"),
        (r"\[?\b(?:[0-9a-f]{1,4}:){3,7}[0-9a-f]{0,4}\]?(?::\d{1,5})?", "[host]"),
        (
            r"\b(?:[a-z0-9-]{1,63}\.){1,8}(?:local|internal|intra|lan|corp|svc|home|localdomain)\b"
            r"(?:\.[a-z.]{1,63})?(?::\d{1,5})?",
            "[host]",
        ),
        (r"\blocalhost(?::\d{1,5})?\b", "[host]"),
        (r"\b(?:[a-z0-9-]{1,63}\.){1,8}[a-z0-9-]{1,63}:\d{2,5}\b", "[host]"),
        (r"\b[a-z][a-z0-9-]{1,62}:\d{4,5}\b", "[host]"),
        (r"(?<![\w/])(?:/[\w.@-]+){3,}", "[path]"),
        (r"\b[A-Za-z0-9+/_-]{40,}", "[redacted]"),
    )
)

# What upstreams say of a prompt that is too long: the limit, and what was asked for.
_TOO_LONG = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        # vLLM, OpenAI and what imitates them
        r"too large: (?P<asked>\d+)\. This model's maximum context length is (?P<limit>\d+) tokens "
        r"and your request has (?P<more>\d+) input tokens",
        r"maximum context length (?:is |of )?(?P<limit>\d+) tokens(?:.{0,80}?"
        r"(?:requested|contains(?: at least)?|resulted in|request has) (?P<asked>\d++)(?! char))?",
        r"input length \((?P<asked>\d+)\) exceeds.{0,40}context length \((?P<limit>\d+)\)",
        r"=(?P<asked>\d+) cannot be greater than max_\w{1,24}=(?:max_\w{1,24}=)?(?P<limit>\d+)",
        r"prompt \(length (?P<asked>\d+)\) is longer than the maximum model length of "
        r"(?P<limit>\d+)",
        r"configured limit of (?P<limit>\d+) tokens.{0,40}resulted in (?P<asked>\d+)",
        r"exceeds? (?:the|this model's) context (?:window|length|limit)",
        # Anthropic
        r"prompt is too long(?:: (?P<asked>\d+) tokens > (?P<limit>\d+))?",
        r"exceed context limit: (?P<asked>\d+) \+ (?P<more>\d+) > (?P<limit>\d+)",
        # Google, Mistral, SGLang, llama.cpp
        r"input token count \(?(?P<asked>\d+)\)? exceeds.{0,60}?\(?(?P<limit>\d+)\)?",
        r"contains (?P<asked>\d+) tokens.{0,60}too large for model with (?P<limit>\d+) maximum",
        r"input \((?P<asked>\d+) tokens\) is longer than.{0,40}context length \((?P<limit>\d+)",
        r"exceeds? the available context size",
        r"maximum context length|context length exceeded",
    )
)
_TOO_LONG_CODES = ("context_length_exceeded", "exceed_context_size_error")
# The model or its server lacks something that another may have.
_UNSUPPORTED = re.compile(
    r"unsupported|not support|n't support|not allowed|unrecognized|"
    r"unknown (?:parameter|argument|field|name)|extra inputs are not permitted|extra_forbidden|"
    r"chat template|must alternate|multimodal|may be provided in one prompt|tool-call-parser|"
    r"no endpoints found|not available|not enabled|only the default|must be verified|"
    r"max_\w{0,20}tokens.{0,60}(?:too large|maximum allowed)",
    re.IGNORECASE,
)
_UNSUPPORTED_CODES = ("unsupported_parameter", "unsupported_value", "unknown_parameter")
_POLICY = re.compile(
    r"content_filter|content_policy|responsibleaipolicy|content management policy|moderation|"
    r"flagged|usage polic",
    re.IGNORECASE,
)
_NO_CREDIT = re.compile(
    r"insufficient_quota|billing|insufficient credits|credit balance|exceeded your current quota|"
    r"account.{0,20}(?:suspend|deactivat)",
    re.IGNORECASE,
)
_OVERLOADED = re.compile(
    r"overloaded|at capacity|over capacity|currently busy|backlog|queue|too many requests|"
    r"no capacity|capacity exceeded|slow down|rate.?limit",
    re.IGNORECASE,
)
_ENGINE_DEAD = re.compile(
    r"EngineCore encountered an issue|EngineDeadError|engine (?:core |loop )?(?:is |has )?"
    r"(?:dead|died|not running|stopped)",
    re.IGNORECASE,
)
_CLIENTS_STATE = re.compile(r"(?:previous )?response with id|previous_response", re.IGNORECASE)
# Codes of values that every SLM refuses.
_CLIENTS_CODES = re.compile(
    r"invalid_type|invalid_value|missing_required|(?:integer|decimal|array|string)_(?:above|below)_"
    r"|invalid_json|empty_array|duplicate_value|invalid_base64"
)
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "BadRequestError": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "NotFoundError": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "context_length_exceeded": 400,
    "server_error": 500,
    "InternalServerError": 500,
    "api_error": 500,
    "ServiceUnavailableError": 503,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_TIMEOUTS = (408, 504, 522, 524, 598, 599)  # Cloudflare's among them
_MAY_BE_CLIENTS = (400, 413, _UNPROCESSABLE)


def _kind(status: int, error: ErrorDocument, origin: Origin, retry_named: bool) -> FailureKind:
    words = f"{error.code} {error.type} {error.message} {error.raw}"
    if status in (401, 402, 403, 404, 405, 407, 410) or status < 400:
        return _configuration_kind(status, words, origin)
    if status in _TIMEOUTS:
        return FailureKind.TIMED_OUT
    if status == 429:
        return _limit_kind(words, origin)
    if status >= 500:
        return _server_kind(status, words, retry_named)
    if _is_too_long(error, words):
        return FailureKind.TOO_LONG
    if _POLICY.search(words):
        # Another SLM would be a way around the policy.
        return FailureKind.INVALID_REQUEST
    if _NO_CREDIT.search(words):
        return FailureKind.MISCONFIGURED  # Anthropic says 400
    if status in (409, 425, 499):
        return FailureKind.FULL
    return _request_kind(status, error, words, origin)


def _configuration_kind(status: int, words: str, origin: Origin) -> FailureKind:
    if status == 404 and _CLIENTS_STATE.search(words):
        return FailureKind.INVALID_REQUEST
    if status == 404 and "no endpoints found" in words.lower():
        return FailureKind.UNSUPPORTED  # OpenRouter, of images and tools
    if status == 403 and not origin.local and _POLICY.search(words):
        return FailureKind.INVALID_REQUEST
    return FailureKind.MISCONFIGURED


def _limit_kind(words: str, origin: Origin) -> FailureKind:
    if _NO_CREDIT.search(words):
        return FailureKind.MISCONFIGURED
    if "request too large" in words.lower():
        return FailureKind.UNSUPPORTED  # above a minute's tokens: waiting does not help
    return FailureKind.FULL if origin.local else FailureKind.RATE_LIMITED


def _server_kind(status: int, words: str, retry_named: bool) -> FailureKind:
    if _ENGINE_DEAD.search(words):
        return FailureKind.ENGINE_DIED
    if status == 501:
        return FailureKind.UNSUPPORTED
    if status == 529 or (status == 503 and (retry_named or _OVERLOADED.search(words))):
        return FailureKind.FULL
    return FailureKind.SERVER_ERROR


def _request_kind(status: int, error: ErrorDocument, words: str, origin: Origin) -> FailureKind:
    if any(code in error.code for code in _UNSUPPORTED_CODES) or _UNSUPPORTED.search(words):
        return FailureKind.UNSUPPORTED
    if status not in _MAY_BE_CLIENTS or (status == 413 and not origin.local):
        return FailureKind.UNSUPPORTED
    if origin.local or _CLIENTS_CODES.search(error.code):
        return FailureKind.INVALID_REQUEST
    # A remote server may be stricter than others; if all refuse, the client hears the last one.
    return FailureKind.UNSUPPORTED


def _is_too_long(error: ErrorDocument, words: str) -> bool:
    if any(code in f"{error.code} {error.type}" for code in _TOO_LONG_CODES):
        return True
    return any(pattern.search(words) for pattern in _TOO_LONG)


def _failure(
    kind: FailureKind, status: int, error: ErrorDocument, origin: Origin, wait_s: float | None
) -> Failure:
    if kind is FailureKind.TOO_LONG:
        limit, asked = _token_counts(f"{error.message} {error.raw}")
        message = context_length_message(limit or origin.context_tokens, asked)
        return Failure(kind, message, param="messages", upstream_status=status)
    own = _OWN_MESSAGES.get(kind)
    if own is not None:
        message = f"{origin.slm_id!r} {own}"
    else:
        message = sanitised(error.message) or f"{origin.slm_id!r} refused the request ({status})"
    return Failure(
        kind,
        message,
        param=error.param,
        code=_code(error.code),
        upstream_status=status,
        retry_after_s=wait_s,
    )


# Said instead of the upstream's words, which are about our account or its insides.
_OWN_MESSAGES = {
    FailureKind.FULL: "takes no more requests at the moment",
    FailureKind.RATE_LIMITED: "has reached the rate limit of its upstream",
    FailureKind.TIMED_OUT: "did not answer in time",
    FailureKind.ENGINE_DIED: "has lost its engine",
    FailureKind.SERVER_ERROR: "failed",
    FailureKind.MISCONFIGURED: "is refused by its upstream; its operator has been told",
    FailureKind.BAD_ANSWER: "gave an answer that cannot be used",
}


def _token_counts(text: str) -> tuple[int, int]:
    """Return (limit, requested) in tokens; 0 for what is not named."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    limit = asked = 0
    for pattern in _TOO_LONG:
        if found := pattern.search(text):
            groups = {name: int(text[:12]) for name, text in found.groupdict("0").items()}
            limit = limit or groups.get("limit", 0)
            asked = asked or groups.get("asked", 0) + groups.get("more", 0)
    return limit, asked


def _code(code: str) -> str | None:
    """Return a code that is a word; numbers and sentences are none."""
    return code if re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{1,63}", code) else None


def _from_list(body: bytes) -> Document | None:
    """Google wraps an error document in a list."""
    stripped = body.strip()
    return parse_object(stripped[1:-1]) if stripped[:1] == b"[" else None


def _text(value: Any) -> str:
    """Return a bounded text; a list or object of errors as Python writes it."""
    if value is None or value is False:
        return ""
    return str(value)[: 2 * MAX_MESSAGE_CHARS]


def _bounded(wait_s: float) -> float:
    return min(max(wait_s, MIN_COOL_DOWN_S), MAX_COOL_DOWN_S)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _date(text: str) -> float | None:
    """Return the Unix seconds of an HTTP date or an RFC 3339 time."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None
