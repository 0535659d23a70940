"""What every HTTP request of a client passes before Serve sees it. Owner: router replica.

Named in the environment of the cluster (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`), because Serve
takes middlewares from nowhere else.
"""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware

# Serve reads them: they would let a client switch off the timeout, or the cancellation of what it
# no longer waits for.
STEERING_HEADERS = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id"}
)


class ClientMiddleware:
    """Drops headers that steer Serve; HTTP/1.0 clients get their answers in one piece."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["headers"] = [
            (name, value)
            for name, value in scope["headers"]
            if name.replace(b"_", b"-") not in STEERING_HEADERS
        ]
        if scope["http_version"] == "1.0":
            send = _Whole(send).send
        await self._app(scope, receive, send)


class _Whole:
    """Sends an answer with its length: HTTP/1.0 has no chunks."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self._start: Any = None
        self._body = b""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        headers = [(k, v) for k, v in self._start["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(self._body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": self._body})


def middlewares() -> list[Middleware]:
    """Return them in the order in which a request passes them; called by Serve."""
    return [Middleware(ClientMiddleware)]
