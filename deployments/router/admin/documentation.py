"""What this service offers, as an OpenAPI document and as a page."""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from deployments.router import http

Endpoint = Callable[[Request], Awaitable[Response]]
PACKAGE = "calm_serve"
# Bodies and answers are OpenAI's and Anthropic's, which their own references describe.
_INFO = (
    "One endpoint in front of a fleet of small language models. Bodies and answers of the `/v1` "
    "routes are those of OpenAI's API, of `/v1/messages` those of Anthropic's."
)


class Documentation:
    """The list of endpoints. `routes` is method and path -> endpoint."""

    def __init__(self, routes: Mapping[tuple[str, str], Endpoint]) -> None:
        self._routes = routes

    async def version(self, request: Request) -> Response:
        """Version of this service."""
        del request
        return http.json_response({"version": version(PACKAGE)})

    async def openapi(self, request: Request) -> Response:
        """This API as an OpenAPI document."""
        del request
        paths: dict[str, dict[str, Any]] = {}
        for method, path, summary in self._rows():
            answers = {"200": {"description": "Answer"}, "default": {"description": "Error"}}
            entry = {"summary": summary, "responses": answers}
            paths.setdefault(path, {})[method.lower()] = entry
        info = {"title": PACKAGE, "version": version(PACKAGE), "description": _INFO}
        return http.json_response({"openapi": "3.1.0", "info": info, "paths": paths})

    async def page(self, request: Request) -> Response:
        """This API as a page."""
        del request
        rows = "".join(
            f"<tr><td>{method}<td><code>{html.escape(path)}</code><td>{html.escape(summary)}"
            for method, path, summary in self._rows()
        )
        return HTMLResponse(
            f"<!doctype html><title>{PACKAGE}</title><h1>{PACKAGE} {version(PACKAGE)}</h1>"
            f"<p>{html.escape(_INFO)}<table>{rows}</table>"
        )

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (method, path, (endpoint.__doc__ or "").strip().partition("\n")[0])
            for (method, path), endpoint in sorted(self._routes.items(), key=lambda r: r[0][::-1])
        ]
