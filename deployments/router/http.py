"""HTTP helpers of the router: JSON bodies, OpenAI's errors, routing headers."""

from __future__ import annotations

import math
import zlib
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from calm_serve.errors import CalmError, CapacityError, RequestError
from calm_serve.requests import ErrorFormat, Route, parse_body
from calm_serve.upstreams import UpstreamError

RESPONSES = "/v1/responses"
ADMIN_BODY_BYTES = 65_536  # limit of feedback, goals and other administration bodies
# Names are lower-case in Starlette. The decision reads only these headers.
_ROUTING_PREFIXES = ("x-calm-", "x-slo-", "x-session-id")


# No proxy on the way may keep events back.
_EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class Cors:
    """Which web pages may call this service (Fetch standard, CORS protocol)."""

    def __init__(self, origins: Collection[str]) -> None:
        """Allow these origins; `*` allows any."""
        self._origins = frozenset(origins)

    def headers(self, request: Request) -> dict[str, str]:
        """Return the headers that allow the page of a request to read the answer."""
        origin = request.headers.get("origin", "")
        if not origin or not ({origin, "*"} & self._origins):
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": "*",
            "vary": "origin",
        }

    def preflight(self, request: Request, methods: Collection[str]) -> Response:
        """Answer OPTIONS for a path with these methods."""
        allowed = ", ".join(sorted({*methods, "OPTIONS"}))
        headers = {"allow": allowed, **self.headers(request)}
        if "access-control-allow-origin" in headers:
            asked = request.headers.get("access-control-request-headers", "content-type")
            headers |= {
                "access-control-allow-methods": allowed,
                "access-control-allow-headers": asked,
                "access-control-max-age": "600",
            }
        return Response(b"", 204, headers)


class TooLargeError(RequestError):
    """413: the body is over the configured limit."""

    http_status = 413


class EventStream(Response):
    """A stream of server-sent events.

    Unlike Starlette's streaming response it watches for no disconnection, because Serve does, and
    cancels the request.
    """

    def __init__(self, parts: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        """Take the parts of the body, and headers beside those of every event stream."""
        self.status_code = 200
        self.background = None
        self.body_iterator = parts
        self.init_headers({**headers, **_EVENT_HEADERS})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts as they come."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for part in self.body_iterator:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]  # a generator
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class UnsupportedEncodingError(RequestError):
    """415: the body is compressed in a way that is not read."""

    http_status = 415


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
    return parse_body(
        _inflated(b"".join(parts), request.headers.get("content-encoding", ""), limit_bytes)
    )


def _inflated(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """Undo the body's compression, up to the limit of an uncompressed one."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise UnsupportedEncodingError(
            f"content-encoding {encoding!r} is not supported; use gzip, deflate or none"
        )
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either format, by its header
    try:
        inflated = inflater.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not valid {encoding}: {error}") from error
    if len(inflated) > limit_bytes:
        raise TooLargeError(f"the body is over {limit_bytes} bytes when inflated")
    if not inflater.eof:
        raise RequestError(f"the {encoding} body is incomplete")
    return inflated


def routing_headers(request: Request) -> dict[str, str]:
    """The headers that the decision reads."""
    return {k: v for k, v in request.headers.items() if k.startswith(_ROUTING_PREFIXES)}


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer."""
    return Response(to_json(data), status, dict(headers or {}), "application/json")


def error_response(
    error: CalmError, headers: Mapping[str, str] | None = None, route: Route | None = None
) -> Response:
    """The error document of the route, OpenAI's without one; `Retry-After` where it is known."""
    extra = dict(headers or {})
    if isinstance(error, UpstreamError):
        extra |= error.failure.headers()
    if isinstance(error, CapacityError):
        extra["retry-after"] = str(math.ceil(error.retry_after_s))
        # Official SDKs read it first. In whole seconds, short waits would all be the same.
        extra["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000.0))
    document = error.to_openai() if route is None else route.error_body(error)
    return json_response(document, error.http_status, extra)


def sse_error(error: CalmError, route: Route) -> bytes:
    """An error event for a stream whose status line is already sent."""
    document = route.error_body(error)
    if route.error_format is ErrorFormat.ANTHROPIC:
        return b"event: error\ndata: " + to_json(document) + b"\n\n"
    if route.path == RESPONSES:
        # Events of this API have a type and no envelope.
        return b"event: error\ndata: " + to_json({**document["error"], "type": "error"}) + b"\n\n"
    return b"data: " + to_json(document) + b"\n\n"
