"""`/v1/goals`: what the operator wants, how it stands, and who changed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from calm_serve.config import Goals, parse_goals
from calm_serve.errors import ConfigError, RequestError
from calm_serve.routing import ModelSelector
from deployments.router import http

BODY_LIMIT_BYTES = 65_536
ACTOR_HEADER = "x-calm-actor"


class GoalKeeper(Protocol):
    """What the endpoints ask of the knowledge client."""

    goals_change: dict[str, Any]  # the change that is in force here; {} before the first

    async def set_goals(self, goals: Goals, by: str) -> dict[str, Any]:
        """Change the goals durably; return the change once this router has it too."""
        ...

    async def goal_history(self, limit: int) -> list[dict[str, Any]]:
        """The newest changes first."""
        ...


class GoalsEndpoint:
    """GET and PUT."""

    def __init__(self, loop: ModelSelector, knowledge: GoalKeeper) -> None:
        self._loop = loop
        self._knowledge = knowledge

    async def get(self, request: Request) -> Response:
        """Goals, weights and targets of this router; `?history=N` adds the last N changes."""
        document = self._document()
        if asked := request.query_params.get("history"):
            if not asked.isdecimal() or len(asked) > 4 or not 1 <= int(asked) <= 1000:
                raise RequestError("'history' must be a number from 1 to 1000", param="history")
            document["history"] = await self._knowledge.goal_history(int(asked))
        return http.json_response(document)

    async def put(self, request: Request) -> Response:
        """Replace the goals, for all routers; fields left out get their defaults.

        Durable when answered; 202 when this router has yet to hear of it. `x-calm-actor`, else the
        client's address, goes to the audit trail.
        """
        body = await http.read_json(request, BODY_LIMIT_BYTES)
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object with the fields of the goals")
        try:
            goals = parse_goals(body, self._loop.fleet)
        except ConfigError as error:
            raise RequestError(error.message, param=error.param) from error
        address = request.client.host if request.client else "unknown"
        by = request.headers.get(ACTOR_HEADER) or address
        change = await self._knowledge.set_goals(goals, by)
        if self._knowledge.goals_change.get("revision", 0) < change["revision"]:
            pending = {"goals": goals.model_dump(mode="json"), "changed": _signed(change)}
            return http.json_response(pending, 202)
        return http.json_response(self._document())

    def _document(self) -> dict[str, Any]:
        changed = _signed(self._knowledge.goals_change)
        goals = self._loop.goals.model_dump(mode="json")
        return {"goals": goals, **goals_section(self._loop), "changed": changed}


def _signed(change: Mapping[str, Any]) -> dict[str, Any]:
    return {key: change.get(key) for key in ("at", "by", "revision")}


def goals_section(loop: ModelSelector) -> dict[str, Any]:
    """The `goals` of /v1/fleet: version, weights in use, and every target with its state."""
    return {
        "version": loop.versions.goals,
        "policy": loop.goals.policy.name,
        "weights": asdict(loop.weights),
        "targets": [asdict(status) for status in loop.controller.status()],
    }
