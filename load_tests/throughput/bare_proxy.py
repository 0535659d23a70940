"""A bare pass-through: what any gateway in Python costs at least, as a side of the benchmark.

    python -m load_tests.throughput.bare_proxy 8001=http://127.0.0.1:9001 8002=http://127.0.0.1:9002

Each port leads to one server, byte by byte in both directions, in one process. Nothing is parsed,
decided, counted or retried.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import aiohttp
import uvicorn


class BareProxy:
    """An ASGI application that forwards to one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Forward one request."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        sent = self._session.request(
            scope["method"],
            self._url + scope["path"],
            data=body,
            headers={"content-type": "application/json"},
        )
        async with sent as response:
            kind = response.headers.get("content-type", "").encode()
            start = {"type": "http.response.start", "status": response.status}
            await send({**start, "headers": [(b"content-type", kind)]})
            async for part in response.content.iter_any():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def serve(pairs: list[str]) -> None:
    """Serve `port=url` pairs until the process is ended."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        servers = []
        for pair in pairs:
            port, url = pair.split("=", 1)
            app = BareProxy(session, url)
            config = uvicorn.Config(
                app,
                port=int(port),
                interface="asgi3",
                http="httptools",
                lifespan="off",
                log_level="warning",
                access_log=False,
            )
            servers.append(uvicorn.Server(config).serve())
        await asyncio.gather(*servers)


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(sys.argv[1:]))
