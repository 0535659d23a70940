"""`/v1/predictors`: the stored predictors, the champion, and how an operator changes it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from calm_serve.errors import RequestError
from deployments.knowledge.client import KnowledgeClient
from deployments.router import http

_KEYS = ("action", "version")


class PredictorsEndpoint:
    """Calls the knowledge actor, which publishes a change to every router."""

    def __init__(self, knowledge: KnowledgeClient) -> None:
        self._knowledge = knowledge

    async def get(self, request: Request) -> Response:
        """Stored predictors; shadow, post-promotion evaluation, last change and training.

        Raises KnowledgeError when the actor does not answer.
        """
        del request
        return http.json_response(await self._knowledge.predictors())

    async def post(self, request: Request) -> Response:
        """`{"action": "pin" | "unpin" | "rollback", "version"}`; answers with the new list.

        Raises RequestError for another body, a predictor that is not stored and an action that is
        not possible now; KnowledgeError when the actor does not answer.
        """
        body = await http.read_json(request, http.ADMIN_BODY_BYTES)
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        if unknown := set(body) - set(_KEYS):
            raise RequestError(f"unknown key {min(unknown)!r}; known: {', '.join(_KEYS)}")
        action, version = body.get("action"), body.get("version", "")
        if not isinstance(action, str) or not isinstance(version, str):
            raise RequestError("'action' and 'version' must be strings", param="action")
        if (action == "pin") != bool(version):
            raise RequestError("'version' is required to pin, and only then", param="version")
        return http.json_response(await self._knowledge.change_predictor(action, version))
