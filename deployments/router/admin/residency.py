"""`/v1/residency`: shows the memory budget and its use, and changes it without a restart."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from calm_serve.config import parse_residency
from calm_serve.errors import ConfigError, RequestError
from calm_serve.routing import ModelSelector
from deployments.knowledge.client import KnowledgeClient
from deployments.router import http
from deployments.router.residency_view import ResidencyView


class ResidencyEndpoint:
    """GET and PUT. A change lasts until the next deployment brings its own configuration."""

    def __init__(
        self, selector: ModelSelector, view: ResidencyView, knowledge: KnowledgeClient
    ) -> None:
        self._selector, self._view, self._knowledge = selector, view, knowledge

    async def get(self, request: Request) -> Response:
        """The settings, memory use, hits and swaps so far, and each SLM's desired tier."""
        del request
        return http.json_response(self._document())

    async def put(self, request: Request) -> Response:
        """Replace the settings for the whole fleet; fields left out get their defaults.

        Raises RequestError for wrong settings and KnowledgeError when the actor does not answer.
        """
        body = await http.read_json(request, http.ADMIN_BODY_BYTES)
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object with the fields of `residency`")
        try:
            options = parse_residency(body, self._selector.fleet)
        except ConfigError as error:
            raise RequestError(error.message, param=error.param) from error
        weights = self._selector.weights
        await self._knowledge.set_residency(options, weights.latency_per_s, weights.energy_per_j)
        return http.json_response({"residency": options.model_dump(mode="json")})

    def _document(self) -> dict[str, Any]:
        summary = self._view.summary
        return {
            "residency": self._view.options.model_dump(mode="json"),
            **({} if summary is None else asdict(summary)),
            "tiers": self._view.desired(),
        }
