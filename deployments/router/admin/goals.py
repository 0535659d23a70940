"""`/v1/goals`: the operator's goals, the state of their targets, and the history of changes."""

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

ACTOR_HEADER = "x-calm-actor"
# Changes in one answer, as `knowledge.goal_history` bounds them; a test compares the two. The
# router does not import that room, which loads SQLAlchemy.
MAX_HISTORY = 1000
ECHO_TIMEOUT_S = 2.0  # wait for this router to receive its own change


class GoalStore(Protocol):
    """The knowledge client, as the endpoint uses it. Its methods raise KnowledgeError."""

    async def set_goals(self, goals: Goals, by: str) -> GoalChange:
        """Change the goals durably."""
        ...

    async def goal_changes(self, limit: int) -> tuple[GoalChange, ...]:
        """The newest changes first."""
        ...


class AppliedGoals(Protocol):
    """The router's subscriptions, as the endpoint uses them."""

    goals_change: GoalChange | None  # in force in this router

    async def wait_for_goals(self, revision: int, timeout_s: float) -> bool:
        """Wait for goals of at least this revision; return whether they arrived in time."""
        ...


class GoalsEndpoint:
    """GET and PUT /v1/goals."""

    def __init__(
        self, selector: ModelSelector, knowledge: GoalStore, applied: AppliedGoals
    ) -> None:
        self._selector, self._knowledge, self._applied = selector, knowledge, applied

    async def get(self, request: Request) -> Response:
        """Goals, weights and targets of this router; `?history=N` adds the last N changes.

        Raises RequestError for an N that is no number from 1 to MAX_HISTORY; with a history,
        KnowledgeError when the actor does not answer.
        """
        document = self._document()
        if limit := request.query_params.get("history"):
            valid = limit.isdecimal() and len(limit) <= len(str(MAX_HISTORY))
            if not valid or not 1 <= int(limit) <= MAX_HISTORY:
                text = f"'history' must be a number from 1 to {MAX_HISTORY}"
                raise RequestError(text, param="history")
            changes = await self._knowledge.goal_changes(int(limit))
            document["history"] = [asdict(change) for change in changes]
        return http.json_response(document)

    async def put(self, request: Request) -> Response:
        """Replace the goals of all routers; fields left out get their defaults.

        Durable when answered; 202 when this router has not received the change yet. The audit trail
        gets `x-calm-actor`, else the client's address. Raises RequestError for wrong goals and
        KnowledgeError when the actor does not answer.
        """
        body = await http.read_json(request, http.ADMIN_BODY_BYTES)
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
            pending = {"goals": goals.model_dump(mode="json"), "changed": _change_summary(change)}
            return http.json_response(pending, 202)
        return http.json_response(self._document())

    def _document(self) -> dict[str, Any]:
        changed = _change_summary(self._applied.goals_change)
        goals = self._selector.goals.model_dump(mode="json")
        return {"goals": goals, **goals_section(self._selector), "changed": changed}


def _change_summary(change: GoalChange | None) -> dict[str, Any]:
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
