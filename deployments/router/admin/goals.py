"""`/v1/goals`: what the operator wants, how it stands, and who changed it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from calm_serve.config import Goals, parse_goals
from calm_serve.errors import ConfigError, RequestError
from calm_serve.protocol.topics import GoalChange
from calm_serve.routing import ModelSelector
from deployments.router import http

BODY_LIMIT_BYTES = 65_536
ACTOR_HEADER = "x-calm-actor"


ECHO_TIMEOUT_S = 2.0  # for this router to receive its own change


class GoalKeeper(Protocol):
    """What the endpoints ask of the knowledge client."""

    async def set_goals(self, goals: Goals, by: str) -> GoalChange:
        """Change the goals durably."""
        ...

    async def goal_history(self, limit: int) -> list[dict[str, Any]]:
        """The newest changes first."""
        ...


class AppliedGoals(Protocol):
    """What the endpoints ask of the router's subscriptions."""

    goals_change: GoalChange | None  # the change that is in force here

    async def wait_for_goals(self, revision: int, timeout_s: float) -> bool:
        """Whether this router has goals of at least that revision, after waiting for them."""
        ...


class GoalsEndpoint:
    """GET and PUT."""

    def __init__(
        self, selector: ModelSelector, knowledge: GoalKeeper, applied: AppliedGoals
    ) -> None:
        self._selector, self._knowledge, self._applied = selector, knowledge, applied

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
            goals = parse_goals(body, self._selector.fleet)
        except ConfigError as error:
            raise RequestError(error.message, param=error.param) from error
        address = request.client.host if request.client else "unknown"
        by = request.headers.get(ACTOR_HEADER) or address
        change = await self._knowledge.set_goals(goals, by)
        if not await self._applied.wait_for_goals(change.revision, ECHO_TIMEOUT_S):
            pending = {"goals": goals.model_dump(mode="json"), "changed": _signed(change)}
            return http.json_response(pending, 202)
        return http.json_response(self._document())

    def _document(self) -> dict[str, Any]:
        changed = _signed(self._applied.goals_change)
        goals = self._selector.goals.model_dump(mode="json")
        return {"goals": goals, **goals_section(self._selector), "changed": changed}


def _signed(change: GoalChange | None) -> dict[str, Any]:
    names = ("at", "by", "revision")
    return {name: None if change is None else getattr(change, name) for name in names}


def goals_section(selector: ModelSelector) -> dict[str, Any]:
    """The `goals` of /v1/fleet: version, weights in use, and every target with its state."""
    return {
        "version": selector.versions.goals,
        "policy": selector.goals.policy.name,
        "weights": asdict(selector.weights),
        "targets": [asdict(status) for status in selector.controller.status()],
    }
