"""Endpoints that operate the router: health, fleet, models, decisions, feedback."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from calm_serve.errors import RequestError, UnknownModelError
from calm_serve.routing import ModelSelector
from calm_serve.types import QualitySignal
from deployments.knowledge.client import KnowledgeClient
from deployments.knowledge.outcome_outbox import OutcomeOutbox
from deployments.observability.exporters import RouterMetrics
from deployments.router import http
from deployments.router.admin.goals import goals_section
from deployments.router.admission import Admission
from deployments.router.fleet_view import FleetView
from deployments.router.subscriptions import Subscriptions

MAX_DECISION_ID_CHARS = 64
_CREATED = 1_700_000_000  # required by OpenAI's schema; has no meaning here


class Operations:
    """Reads the router's state; only feedback changes anything."""

    def __init__(
        self,
        selector: ModelSelector,
        view: FleetView,
        knowledge: KnowledgeClient,
        subscriptions: Subscriptions,
        metrics: RouterMetrics,
        outcomes: OutcomeOutbox,
        admission: Admission,
    ) -> None:
        self._selector = selector
        self._view = view
        self._knowledge, self._subscriptions = knowledge, subscriptions
        self._metrics = metrics
        self._outcomes, self._admission = outcomes, admission

    async def health(self, request: Request) -> Response:
        """200 after every hot SLM has been up once; before that 503 with the states."""
        del request
        ready = self._view.refresh_ready()
        body = {"status": "ok" if ready else "starting", "slms": self._view.states()}
        return http.json_response(body, 200 if ready else 503)

    async def load(self, request: Request) -> Response:
        """Requests in all SLMs, as far as this router knows."""
        del request
        states = (self._view.state(slm) for slm in self._selector.fleet.slms)
        return http.json_response({"server_load": sum(s.running + s.waiting for s in states)})

    async def fleet(self, request: Request) -> Response:
        """State, load, memory and times of every SLM."""
        del request
        return http.json_response(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """The `/v1/fleet` document."""
        predictor = {
            "version": str(self._selector.predictor.version),
            "source": self._subscriptions.predictor_source,
            "outcomes_pending": self._outcomes.pending_rows,
            "outcomes_lost": self._outcomes.lost_rows,
            "knowledge_reachable": self._knowledge.reachable,
            **self._predictors(),
        }
        return self._view.snapshot(predictor) | {
            "goals": goals_section(self._selector),
            "requests_in_work": self._admission.in_work,
        }

    def _predictors(self) -> dict[str, Any]:
        status = self._subscriptions.predictors
        return {} if status is None else asdict(status)

    async def models(self, request: Request) -> Response:
        """OpenAI's model list: `auto`, every SLM, every adapter as `slm:adapter`."""
        del request
        return http.json_response({"object": "list", "data": list(self._models().values())})

    def model(self, name: str) -> Response:
        """One entry of the model list. Raises UnknownModelError (404) when there is none."""
        found = self._models().get(name)
        if found is None:
            raise UnknownModelError(f"model {name!r} not found", param="model")
        return http.json_response(found)

    async def decision(self, decision_id: str) -> Response:
        """The record of a decision: from this router's memory, else the stored outcome.

        Raises RequestError with status 404 when there is neither, and KnowledgeError when the actor
        has to be asked and does not answer.
        """
        decision = self._selector.recall(decision_id)
        if decision is not None:
            return http.json_response(self._selector.explain(decision))
        stored = await self._knowledge.outcome(decision_id)
        if stored is None:
            error = RequestError(f"decision {decision_id!r} not found", param="decision_id")
            error.http_status = 404
            raise error
        return http.json_response(asdict(stored))

    async def feedback(self, body: Any) -> Response:
        """`{"decision_id", "score"}`, score in [0, 1] or a boolean; durable when answered.

        Raises RequestError for another body and KnowledgeError when the actor does not answer.
        """
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        unknown = set(body) - {"decision_id", "score"}
        if unknown:
            raise RequestError(f"unknown key {sorted(unknown)[0]!r}; known: decision_id, score")
        decision_id, score = body.get("decision_id"), body.get("score")
        if (
            not isinstance(decision_id, str)
            or not decision_id
            or len(decision_id) > MAX_DECISION_ID_CHARS
        ):
            raise RequestError("'decision_id' must be the x-calm-decision-id", param="decision_id")
        if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
            raise RequestError("'score' must be a number from 0 to 1", param="score")
        signal = QualitySignal("feedback", float(score), time.time())
        await self._knowledge.feedback(decision_id, (signal,))
        return http.json_response({"decision_id": decision_id, "accepted": True})

    def _models(self) -> dict[str, dict[str, Any]]:
        entries = {"auto": _entry("auto", "calm_serve", "Let the router choose.")}
        for slm in self._selector.fleet.slms:
            entries[slm.id] = _entry(slm.id, slm.locality, slm.description) | {
                "max_model_len": slm.context_tokens
            }
            for adapter in slm.adapters:
                name = f"{slm.id}:{adapter.name}"
                entries[name] = _entry(name, slm.locality, adapter.description) | {"parent": slm.id}
        return entries


def _entry(name: str, owner: str, description: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _CREATED,
        "owned_by": owner,
        "description": description,
    }
