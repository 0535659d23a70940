"""Completions: the endpoints that decide, call the SLM, stream its reply and record the outcome."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from calm_serve.config import ServeArgs
from calm_serve.errors import CalmError
from calm_serve.prediction import live_load
from calm_serve.protocol.answers import AnswerRequest
from calm_serve.requests import (
    Overrides,
    ParsedRequest,
    Route,
    parse_overrides,
)
from calm_serve.routing import ModelSelector
from calm_serve.types import Decision, Residency
from deployments.router import (
    dispatch,
    http,
    outcome,
    wakeup_queue,
)
from deployments.router.admission import Admission, Place
from deployments.router.fleet_view import FleetView
from deployments.router.wakeup_queue import WakeupQueue

JSON = "application/json"
# Takes the id, the error, the client's task label and the seconds of a request that was refused
# before an SLM was chosen.
Refused = Callable[[str, CalmError, str, float], None]
# Takes a finished call, its request, the client's task label and, with `keep_prompts`, the prompt.
Record = Callable[[dispatch.Call, ParsedRequest, str, str | None], None]


class CompletionsEndpoint:
    """All routes that an SLM answers. Every call is recorded once, however it ends."""

    def __init__(
        self,
        args: ServeArgs,
        selector: ModelSelector,
        view: FleetView,
        queue: WakeupQueue,
        dispatcher: dispatch.Dispatcher,
        admission: Admission,
        record: Record,
        refused: Refused,
    ) -> None:
        self._args = args
        self._limit_bytes = int(args.router.max_body_bytes)
        self._selector, self._view, self._wakeup_queue = selector, view, queue
        self._dispatcher, self._admission = dispatcher, admission
        self._record, self._refused = record, refused

    def of(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of one route."""

        async def endpoint(request: Request) -> Response:
            return await self._answer(request, route)

        endpoint.__doc__ = f"Answered by an SLM ({route.task})."
        return endpoint

    async def _answer(self, request: Request, route: Route) -> Response:
        decision_id = uuid.uuid4().hex
        headers = {
            "x-calm-decision-id": decision_id,
            "x-calm-model": "",
            "x-calm-reason": "refused",
        }
        started, task = time.perf_counter(), ""
        try:
            place = self._admission.enter()
            overrides = parse_overrides(http.routing_headers(request))
            task = overrides.task
            body = await http.read_json(request, self._limit_bytes)
            parsed = route.parse(body)
            decision = self._selector.decide(parsed, overrides, decision_id)
        except CalmError as error:
            self._refused(decision_id, error, task, time.perf_counter() - started)
            return http.error_response(error, headers, route)
        call = self._call(decision, parsed, place)
        prompt = parsed.text if self._args.learning.keep_prompts else None
        finish = outcome.Finish(call, lambda: self._record(call, parsed, task, prompt))
        headers |= {"x-calm-model": decision.slm_id, "x-calm-reason": call.reason}
        asked = _asked(decision, parsed, overrides)
        opening = self._dispatcher.open(call, route.path, body, asked)
        return await self._respond(call, route, opening, parsed.stream, headers, finish)

    async def _respond(
        self,
        call: dispatch.Call,
        route: Route,
        opening: Coroutine[Any, Any, AsyncIterator[bytes]],
        stream: bool,
        headers: dict[str, str],
        finish: outcome.Finish,
    ) -> Response:
        """The response to a request whose SLM is chosen; awaiting `opening` sends the request."""
        answer: AsyncIterator[bytes] | None = None
        try:
            async with asyncio.timeout(call.left_s):
                if stream and call.state.residency is not Residency.HOT:
                    waking = await wakeup_queue.wait_briefly(
                        opening, wakeup_queue.KEEPALIVE_AFTER_S
                    )
                    if not waking.done():
                        events = wakeup_queue.cancel_with(
                            self._keep_alive(call, route, waking, finish), waking
                        )
                        return http.EventStream(events, headers)
                    answer = waking.result()
                else:
                    answer = await opening
                self._follow_failover(call)
                headers |= {"x-calm-model": call.slm_id, "x-calm-reason": call.reason}
                if not stream:
                    payload = b"".join([part async for part in answer])
                    return finish(Response(payload, 200, headers, JSON))
        except asyncio.CancelledError:
            outcome.cancelled(call)
            dispatch.cancel(answer)
            finish()
            raise
        except CalmError as error:
            return finish(http.error_response(outcome.refused(call, error), headers, route))
        except Exception as error:  # noqa: BLE001  # as in `dispatch`: of any type
            dispatch.cancel(answer)
            return finish(http.error_response(outcome.gone(call, error), headers, route))
        return http.EventStream(self._stream(call, route, answer, finish), headers)

    def _call(self, decision: Decision, parsed: ParsedRequest, place: Place) -> dispatch.Call:
        spec = self._selector.specs[decision.slm_id]
        state = self._view.state(spec)
        limit_s = self._args.router.request_timeout_s
        if decision.context.slo.deadline_s:
            limit_s = min(limit_s, decision.context.slo.deadline_s)
        load = live_load(decision.context, spec, state)
        call = dispatch.Call(decision, state, load, limit_s=limit_s, place=place)
        if decision.unscored:
            call.rank_unscored = partial(self._selector.rank_unscored, decision, parsed)
        if self._view.residency.active:
            preferred = self._view.state(self._selector.specs[decision.preferred])
            self._wakeup_queue.count_demand(call, hit=preferred.residency is Residency.HOT)
        return call

    def _follow_failover(self, call: dispatch.Call) -> None:
        """After a failover, record state and load of the SLM that answers, for the outcome."""
        spec = self._selector.specs.get(call.slm_id)
        if spec is not None and call.slm_id != call.decision.slm_id:
            call.state = self._view.state(spec)
            call.load = live_load(call.decision.context, spec, call.state)

    async def _keep_alive(
        self,
        call: dispatch.Call,
        route: Route,
        opening: asyncio.Future[AsyncIterator[bytes]],
        finish: outcome.Finish,
    ) -> AsyncIterator[bytes]:
        """A stream that begins before its SLM is awake: keepalives first, errors as events."""
        try:
            async with asyncio.timeout(call.left_s):
                async for comment in wakeup_queue.keepalives(
                    opening, wakeup_queue.KEEPALIVE_PERIOD_S
                ):
                    yield comment
            answer = opening.result()
            self._follow_failover(call)
            async for part in self._stream(call, route, answer, finish):
                yield part
        except CalmError as error:
            yield http.sse_error(outcome.refused(call, error), route)
        except Exception as error:  # noqa: BLE001  # as in `dispatch`: of any type
            yield http.sse_error(outcome.gone(call, error), route)
        except (asyncio.CancelledError, GeneratorExit):
            outcome.cancelled(call)
            raise
        finally:
            if call.end is None:
                wakeup_queue.discard(opening)
            finish()

    async def _stream(
        self,
        call: dispatch.Call,
        route: Route,
        answer: AsyncIterator[bytes],
        finish: outcome.Finish,
    ) -> AsyncIterator[bytes]:
        try:
            async with asyncio.timeout(call.left_s):
                async for part in answer:
                    if part:
                        yield part
        except Exception as error:  # noqa: BLE001  # as in `dispatch`: of any type
            # The status line is sent already, so the client gets an error event instead of [DONE].
            yield http.sse_error(outcome.gone(call, error), route)
        except (asyncio.CancelledError, GeneratorExit):
            outcome.cancelled(call)
            raise
        finally:
            if call.end is None:
                dispatch.cancel(answer)
            finish()


def _asked(decision: Decision, parsed: ParsedRequest, overrides: Overrides) -> AnswerRequest:
    """What the SLM replica has to know beside the body."""
    return AnswerRequest(
        decision_id=decision.decision_id,
        adapter=decision.adapter,
        validate=overrides.validate or ("json" if parsed.schema is not None else ""),
        labels=overrides.labels,
        # Two blocks, because the last one may be partial: then the next turn of the conversation
        # contains the one before it only.
        prefix_end=decision.context.prefix_chain[-2:],
        prompt_tokens=decision.context.prompt_tokens,
    )
