"""HTTP helpers of the router: JSON bodies, OpenAI's errors, routing headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from calm_serve.errors import CalmError, CapacityError, RequestError, openai_error
from calm_serve.requests import parse_body

ADMIN_BODY_BYTES = 65_536  # limit of feedback, goals and other administration bodies
# Names are lower-case in Starlette. The decision reads only these headers.
_ROUTING_PREFIXES = ("x-calm-", "x-slo-", "x-session-id")


class TooLargeError(RequestError):
    """413: the body is over the configured limit."""

    http_status = 413


async def read_json(request: Request, limit_bytes: int) -> Any:
    """Read and parse the body. Raises RequestError (400) or TooLargeError (413)."""
    declared = request.headers.get("content-length", "0")
    size = 0
    parts: list[bytes] = []
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise TooLargeError(f"the body is over {limit_bytes} bytes")
    async for part in request.stream():
        size += len(part)
        if size > limit_bytes:
            raise TooLargeError(f"the body is over {limit_bytes} bytes")
        parts.append(part)
    return parse_body(b"".join(parts))


def routing_headers(request: Request) -> dict[str, str]:
    """The headers that the decision reads."""
    return {k: v for k, v in request.headers.items() if k.startswith(_ROUTING_PREFIXES)}


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer."""
    return Response(to_json(data), status, dict(headers or {}), "application/json")


def error_response(error: CalmError, headers: Mapping[str, str] | None = None) -> Response:
    """OpenAI's error document; capacity errors have `Retry-After`."""
    extra = dict(headers or {})
    if isinstance(error, CapacityError):
        extra["retry-after"] = str(math.ceil(error.retry_after_s))
    return json_response(error.to_openai(), error.http_status, extra)


def sse_error(error: CalmError) -> bytes:
    """An error event for a stream whose status line is already sent."""
    body = openai_error(error.message, error.error_type, error.param, error.code)
    return b"data: " + to_json(body) + b"\n\n"
