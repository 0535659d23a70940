"""An HTTP server on a free port of this node, inside the process of a replica."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

KEEP_ALIVE_S = 75  # longer than a router keeps an idle connection, so that the router closes it
STOP_TIMEOUT_S = 5.0


class HttpServer:
    """Serves an ASGI application until `stop`."""

    def __init__(self, app: Any, host: str) -> None:
        """Bind a free port of `host`; raises OSError."""
        self._socket = socket.socket(
            socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        port = self._socket.getsockname()[1]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                # A bound method is not recognised as an ASGI 3 application by itself.
                interface="asgi3",
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                backlog=2048,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept connections from now on. Raises what the server raises when it cannot."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise RuntimeError("the HTTP server ended before it had started")
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Close the port; running requests may finish for STOP_TIMEOUT_S."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=STOP_TIMEOUT_S)
            self._task.cancel()
