"""The router deployment. It is the HTTP ingress, and reaches the SLMs over HTTP, past Ray.

`__call__` takes the raw request; a table maps paths to methods. `calm_serve` decides, the reply's
bytes pass through unchanged, and slow work (outcomes, metrics, knowledge) runs in background tasks.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from calm_serve.config import Fleet, ServeArgs
from calm_serve.errors import CalmError, RequestError
from calm_serve.goals import GoalController
from calm_serve.requests import (
    ROUTES,
    ParsedRequest,
    parse_chat,
    parse_completion,
    parse_overrides,
)
from calm_serve.routing import ModelSelector
from calm_serve.upstreams import failure_kind
from deployments.knowledge.client import KnowledgeClient
from deployments.knowledge.outcome_outbox import OutcomeOutbox
from deployments.observability.exporters import (
    CONTENT_TYPE,
    RouterMetrics,
    render_fleet_metrics,
)
from deployments.observability.host import HostMonitor
from deployments.router import dispatch, http
from deployments.router.admin.documentation import Documentation
from deployments.router.admin.goals import GoalsEndpoint
from deployments.router.admin.operations import Operations
from deployments.router.admin.predictors import PredictorsEndpoint
from deployments.router.admin.residency import ResidencyEndpoint
from deployments.router.admission import Admission
from deployments.router.completions import CompletionsEndpoint
from deployments.router.fleet_view import FleetView
from deployments.router.handles import Handles
from deployments.router.outcome import RefusedLog, outcome_of, refused_outcome
from deployments.router.subscriptions import Subscriptions
from deployments.router.upstream import Upstream
from deployments.router.wakeup_queue import WakeupQueue

log = logging.getLogger("ray.serve")

REFRESH_S = 1.0  # between two updates of the gauges
STEER_S = 0.25  # between two steps of the goal controller
Endpoint = Callable[[Request], Awaitable[Response]]


class Router:
    """One router replica. `handles` are the SLMs of this application, by SLM id."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, args: ServeArgs, fleet: Fleet, app_name: str, handles: dict[str, DeploymentHandle]
    ) -> None:
        self._args = args
        self._limit_bytes = int(args.router.max_body_bytes)
        self._cors = http.Cors(args.router.cors_origins)
        replica = serve.get_replica_context().replica_id.unique_id
        self._view = FleetView(fleet, on_failure=self._replica_failed)
        self._wakeup_queue = WakeupQueue(self._view.residency, args.router, replica)
        self._handles = Handles(handles)
        random = Random()  # for the jitter of Retry-After
        self._admission = Admission(args.router.max_ongoing_requests, time.monotonic, random.random)
        self._refused_log = RefusedLog(time.monotonic)
        self._selector = ModelSelector(
            fleet,
            args.goals,
            read_state=self._view.state,
            decision_log=args.router.decision_log,
            controller=GoalController(args.goals, routers=args.router.replicas),
        )
        self._upstream = self.connect_upstream(random.random)
        self._metrics = RouterMetrics(time.monotonic, [s.id for s in fleet.slms])
        self._knowledge = KnowledgeClient(app_name, args.learning, fleet)
        self._subscriptions = Subscriptions(fleet, self._selector, self._view, self._handles)
        self._outcomes = OutcomeOutbox(
            self._knowledge.log, Path(args.learning.state_dir) / "spool" / f"{replica}.jsonl"
        )
        self._operations = Operations(
            self._selector,
            self._view,
            self._knowledge,
            self._subscriptions,
            self._metrics,
            self._outcomes,
            self._admission,
        )
        self._routes = self._endpoints(self._completions())
        self._outcomes.start()
        self._tasks = self._background()

    def _completions(self) -> CompletionsEndpoint:
        options = self._args.router
        dispatcher = dispatch.Dispatcher(
            self._upstream.call,
            health=self._view,
            retries=options.retries,
            queue_wait_s=options.max_queue_wait_s,
            admit=self._wakeup_queue.admit,
        )
        return CompletionsEndpoint(
            self._args,
            self._selector,
            self._view,
            self._wakeup_queue,
            dispatcher,
            self._admission,
            self.record,
            self.refused,
        )

    def _background(self) -> list[asyncio.Task[None]]:
        return [
            asyncio.create_task(self._knowledge.follow(self._subscriptions.apply)),
            asyncio.create_task(self._refresh()),
            asyncio.create_task(self._steer()),
            asyncio.create_task(
                self._wakeup_queue.run(self._knowledge.report_demand, lambda: self._selector.fleet)
            ),
        ]

    def connect_upstream(self, random: Callable[[], float]) -> Upstream:
        """Return the connections to the SLMs."""
        return Upstream(
            spec=lambda slm_id: self._selector.specs[slm_id],
            start_replica=self._start_replica,
            clock=time.monotonic,
            random=random,
        )

    def _replica_failed(self, replica_id: str) -> None:
        self._upstream.replica_failed(replica_id)

    def _start_replica(self, slm_id: str) -> Awaitable[object] | None:
        """Let Serve start a replica of an SLM that may have none, and wait for it."""
        if self._selector.specs[slm_id].scaling.min_replicas:
            return None
        return self._wait_for_replica(slm_id)

    async def _wait_for_replica(self, slm_id: str) -> None:
        with self._wakeup_queue.place(slm_id):
            # Counts as queued, by which Serve scales up from zero.
            await self._handles.get(slm_id).ready.remote()

    def _endpoints(self, completions: CompletionsEndpoint) -> dict[tuple[str, str], Endpoint]:
        """Method and path -> endpoint; `__call__` adds the paths that end in an id."""
        goals = GoalsEndpoint(self._selector, self._knowledge, self._subscriptions)
        predictors = PredictorsEndpoint(self._knowledge)
        residency = ResidencyEndpoint(self._selector, self._view.residency, self._knowledge)
        routes: dict[tuple[str, str], Endpoint] = {
            **{("POST", path): completions.of(route) for path, route in ROUTES.items()},
            ("POST", "/v1/route"): self._route,
            ("POST", "/v1/feedback"): self._feedback,
            ("GET", "/v1/models"): self._operations.models,
            ("GET", "/v1/fleet"): self._operations.fleet,
            ("GET", "/v1/goals"): goals.get,
            ("PUT", "/v1/goals"): goals.put,
            ("GET", "/v1/residency"): residency.get,
            ("PUT", "/v1/residency"): residency.put,
            ("GET", "/v1/predictors"): predictors.get,
            ("POST", "/v1/predictors"): predictors.post,
            ("GET", "/health"): self._operations.health,
            ("GET", "/ping"): self._operations.health,
            ("GET", "/load"): self._operations.load,
            ("GET", "/metrics"): self._metrics_text,
        }
        documentation = Documentation(routes)  # its own included
        routes |= {
            ("GET", "/version"): documentation.version,
            ("GET", "/openapi.json"): documentation.openapi,
            ("GET", "/docs"): documentation.page,
        }
        return routes

    async def __call__(self, request: Request) -> Response:
        """Serve one HTTP request."""
        path = request.scope["path"].rstrip("/") or "/"  # `request.url` costs 0.1 ms
        methods = {method for method, known in self._routes if known == path}
        methods |= {"HEAD"} if "GET" in methods else set()
        if request.method == "OPTIONS" and methods:
            return self._cors.preflight(request, methods)
        response = await self._answered(request, path, methods)
        if headers := self._cors.headers(request):
            response.headers.update(headers)
        return response

    async def _answered(self, request: Request, path: str, methods: set[str]) -> Response:
        # HEAD is GET without the body, which the server leaves out.
        method = "GET" if request.method == "HEAD" else request.method
        endpoint = self._routes.get((method, path))
        try:
            if endpoint is not None:
                return await endpoint(request)
            if method == "GET" and path.startswith("/v1/decisions/"):
                return await self._operations.decision(path.rpartition("/")[2])
            if method == "GET" and path.startswith("/v1/models/"):
                return self._operations.model(path.removeprefix("/v1/models/"))
            error = RequestError(f"{request.method} {path} is not an endpoint")
            error.http_status = 405 if methods else 404
            return http.error_response(error, {"allow": ", ".join(sorted(methods))})
        except CalmError as error:
            return http.error_response(error)
        except Exception:  # of any type: the client gets an error in OpenAI's format
            log.exception("request to %s failed", path)
            return http.error_response(CalmError("internal error"))

    async def _route(self, request: Request) -> Response:
        """Decide about a body without answering it."""
        body = await http.read_json(request, self._limit_bytes)
        parse = parse_completion if isinstance(body, dict) and "prompt" in body else parse_chat
        overrides = parse_overrides(http.routing_headers(request))
        parsed = parse(body)
        decision = self._selector.decide(parsed, overrides, uuid.uuid4().hex)
        self._selector.complete(decision, parsed)
        return http.json_response(self._selector.explain(decision))

    async def _feedback(self, request: Request) -> Response:
        """Rate an answer by its decision id."""
        body = await http.read_json(request, http.ADMIN_BODY_BYTES)
        return await self._operations.feedback(body)

    async def _metrics_text(self, request: Request) -> Response:
        """Metrics in Prometheus' text format."""
        del request
        text = render_fleet_metrics(self._metrics.aggregates, self._operations.snapshot())
        return Response(text, 200, media_type=CONTENT_TYPE)

    def record(
        self, call: dispatch.Call, parsed: ParsedRequest, task: str, prompt: str | None
    ) -> None:
        """Record the outcome of a finished call in statistics, controller, metrics and outbox."""
        self._wakeup_queue.release(call)
        if failed := call.failure and call.status != "cancelled":
            self._refused_log.add(call.failure, call.decision.decision_id, call.failure_text)
        if parsed.tokenizer_only:  # no model ran, so its times say nothing of the SLM
            if failed:
                self._metrics.refused(call.failure)
            return
        self._selector.complete(call.decision, parsed)
        outcome = outcome_of(call, at=time.time(), task=task, prompt=prompt)
        goals = self._selector.goals
        shadow = self._subscriptions.shadow.compare(outcome, goals.quality_floor, goals.default_slm)
        if shadow is not None:
            outcome = replace(outcome, decision=replace(outcome.decision, shadow=shadow))
        self._view.observe(outcome, call.took_s)
        self._view.monitor.chose(call.decision)
        self._selector.learn(call.decision, outcome)
        self._metrics.observe(outcome)
        self._outcomes.add(outcome)

    def refused(self, decision_id: str, error: CalmError, task: str, took_s: float) -> None:
        """Record a request that was refused before an SLM was chosen."""
        kind = failure_kind(error)
        self._refused_log.add(kind, decision_id, error.message)
        found = refused_outcome(decision_id, error, at=time.time(), task=task, took_s=took_s)
        if found is None:
            self._metrics.refused(kind)
            return
        self._metrics.observe(found)
        self._outcomes.add(found)

    async def _refresh(self) -> None:
        host = HostMonitor(time.monotonic)
        while True:
            await self._handles.connect(self._selector.fleet)
            self._metrics.refresh(self._operations.snapshot(), host.read())
            await asyncio.sleep(REFRESH_S)

    async def _steer(self) -> None:
        while True:
            self._selector.tick()
            await asyncio.sleep(STEER_S)

    async def check_health(self) -> None:
        """Raise when a background task has died; Serve then replaces this replica."""
        for task in (*self._tasks, *self._outcomes.tasks):
            if task.done():
                raise RuntimeError(f"background task ended: {task}")

    async def __del__(self) -> None:
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if outcomes := getattr(self, "_outcomes", None):
            await outcomes.stop()
        if upstream := getattr(self, "_upstream", None):
            await upstream.close()
