"""Outcome of a call: its record, made exactly once, and the client's error when it failed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from starlette.responses import Response

from calm_serve.errors import CalmError, CapacityError, NoCandidateError, SLMUnavailableError
from calm_serve.learning import decision_terms
from calm_serve.telemetry import load_at_decision
from calm_serve.types import (
    DecisionPath,
    DecisionReason,
    DecisionSummary,
    EngineFacts,
    Outcome,
    Residency,
    Timing,
)
from calm_serve.upstreams import Failure, FailureKind, UpstreamError, failure_kind
from deployments.router import dispatch

log = logging.getLogger("ray.serve")

STALLED_S = 10.0  # without a new part, an answer does not merely take long
LOG_PERIOD_S = 1.0
MAX_ATTEMPTS = 16  # failed ones that an outcome names

# Over a few tokens, TPOT is mostly the overhead of the reply.
MIN_TPOT_TOKENS = 8


class Finish:
    """Records a call once: at the answer's end, at an error, or when the client disconnects."""

    def __init__(self, call: dispatch.Call, record: Callable[[], None]) -> None:
        self._call, self._record = call, record
        self._done = False

    def __call__(self, response: Response | None = None) -> Response:
        """Record the call if it is not recorded yet; return the response."""
        if not self._done:
            self._done = True
            if self._call.place is not None:
                self._call.place.release()
            try:
                self._record()
            except Exception:  # an error of the record must not cost the client its answer
                log.exception(
                    "the outcome of call %s was not recorded", self._call.decision.decision_id
                )
        return response or Response()

    def __del__(self) -> None:
        # If the client disconnects before its stream has begun, nothing else calls this.
        if not self._done:
            cancelled(self._call)
            self()


def cancelled(call: dispatch.Call) -> None:
    """Mark a call whose client disconnected."""
    call.status, call.http_status, call.failure = "cancelled", 499, "cancelled"


def refused(call: dispatch.Call, error: CalmError) -> CalmError:
    """Mark a call that no SLM answered; `rejected` speaks against no SLM.

    A stream that broke after it had begun is an error, unless it only took longer than it may.
    """
    call.http_status, call.failure = error.http_status, failure_kind(error)
    call.failure_text = error.message
    broke_off = call.first_byte_s is not None and call.failure != FailureKind.OUT_OF_TIME
    call.status = "error" if broke_off or _speaks_against_slm(error) else "rejected"
    return error


def gone(call: dispatch.Call, error: BaseException) -> CalmError:
    """Mark a call whose SLM failed or timed out while answering; return the client's error."""
    if isinstance(error, UpstreamError):
        return refused(call, error)
    if isinstance(error, TimeoutError):
        deadline_s = call.decision.context.slo.deadline_s
        # A client may ask for less time than an answer takes, or for an answer that takes longer
        # than the operator allows.
        late = call.limit_s == deadline_s or _advances(call)
        kind = FailureKind.OUT_OF_TIME if late else FailureKind.TIMED_OUT
        message = f"SLM {call.slm_id!r} did not finish in {call.limit_s:g} s"
        return refused(call, UpstreamError(Failure(kind, message)))
    call.status, call.failure = "error", "internal"
    failure = SLMUnavailableError(f"SLM {call.slm_id!r} failed while answering")
    call.http_status = failure.http_status
    return failure


def _speaks_against_slm(error: CalmError) -> bool:
    if isinstance(error, UpstreamError):
        return error.failure.consequence.breaker
    return not isinstance(error, CapacityError | SLMUnavailableError)


def _advances(call: dispatch.Call) -> bool:
    """Whether parts of the answer were still coming a moment ago."""
    since_last_s = call.elapsed_s - call.last_byte_s
    return call.first_byte_s is not None and since_last_s < min(STALLED_S, call.limit_s / 2.0)


def refused_outcome(
    decision_id: str, error: CalmError, *, at: float, task: str, took_s: float
) -> Outcome | None:
    """Return the outcome of a request for which no SLM could be chosen.

    None for a request that is wrong, and for one that the router was too full to read: their number
    is in the metrics. They say nothing of the fleet, and under overload each row of the log would
    cost what the limit saves.
    """
    if not isinstance(error, SLMUnavailableError | NoCandidateError):
        return None
    return Outcome(
        outcome_id=decision_id,
        slm_id="",
        at=at,
        status="rejected",
        http_status=error.http_status,
        failure=failure_kind(error),
        task=task,
        timing=Timing(e2e_s=took_s),
    )


class RefusedLog:
    """Log lines about refused requests: one per kind and LOG_PERIOD_S, with the number of others.

    A full service refuses thousands a second. `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}  # kind -> when it was logged, others since

    def add(self, kind: str, decision_id: str, message: str) -> None:
        """Note a refused request."""
        now_s = self._clock()
        logged_at, others = self._last.get(kind, (-math.inf, 0))
        if now_s < logged_at + LOG_PERIOD_S:
            self._last[kind] = (logged_at, others + 1)
            return
        self._last[kind] = (now_s, 0)
        more = f" (and {others} more since the last such line)" if others else ""
        log.warning("request %s refused: %s: %s%s", decision_id, kind, message, more)


def outcome_of(call: dispatch.Call, *, at: float, task: str, prompt: str | None) -> Outcome:
    """Return the outcome of a finished call. `at` is Unix time in seconds."""
    decision, context = call.decision, call.decision.context
    facts = call.end.facts if call.end else EngineFacts()
    e2e_s = time.perf_counter() - call.started
    # Without streaming, only the engine knows when the first token came.
    ttft_s = call.first_byte_s if context.stream else facts.ttft_s or None
    tpot_s = None
    if ttft_s is not None and facts.output_tokens >= MIN_TPOT_TOKENS:
        tpot_s = max(e2e_s - ttft_s, 0.0) / (facts.output_tokens - 1)
    return Outcome(
        outcome_id=decision.decision_id,
        slm_id=call.slm_id or decision.slm_id,
        at=at,
        adapter=decision.adapter,
        status=call.status,
        http_status=call.http_status,
        failure=call.failure,
        failed_attempts=tuple(call.failed_attempts[-MAX_ATTEMPTS:]),
        cost=_cost(call),
        currency=call.currency,
        retries=call.retries,
        predicted_replica=call.predicted_replica,
        task=task,
        decision=_summary(call),
        features=context.features,
        timing=Timing(
            ttft_s=ttft_s,
            e2e_s=e2e_s,
            tpot_s=tpot_s,
            decision_s=decision.decided_in_s,
            cold=call.queued_for_wakeup
            or call.state.residency is not Residency.HOT
            or not call.state.replicas,
        ),
        engine=facts,
        signals=call.end.signals if call.end else (),
        prompt_text=prompt,
    )


def _cost(call: dispatch.Call) -> float | None:
    """Money for all attempts, as far as it is known."""
    amounts = [a.cost for a in call.failed_attempts]
    if (money := dispatch.cost_of(call.reply)) is not None:
        amounts.append(money.amount)
        call.currency = call.currency or money.currency
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known else None


def _summary(call: dispatch.Call) -> DecisionSummary:
    decision = call.decision
    answered_by = next((c for c in decision.candidates if c.slm_id == call.slm_id), None)
    watched = call.preferred_hot is not None
    return DecisionSummary(
        path=str(DecisionPath.FALLBACK if call.fell_back else decision.path),
        reason=str(DecisionReason.FAILOVER if call.fell_back else decision.reason),
        rule=decision.rule,
        propensity=decision.propensity,
        versions=decision.versions,
        predicted=answered_by.prediction if answered_by else None,
        load_features=call.load,
        load=load_at_decision(call.state),
        terms=decision_terms(decision),
        preferred=decision.preferred if watched else "",
        preferred_hot=call.preferred_hot,
        novelty=decision.novelty,
    )
