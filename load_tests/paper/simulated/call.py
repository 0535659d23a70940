"""One simulated request of the `paper` experiment, and the outcome that the router would log."""

from __future__ import annotations

from dataclasses import dataclass, field

from calm_serve.telemetry import load_at_decision
from calm_serve.testing import Served, make_outcome
from calm_serve.types import Decision, Outcome, QualitySignal, SLMState


@dataclass
class Fault:
    """A fault of one SLM. `fails` and `wrong` are shares of its requests."""

    fails: float = 0.0
    wrong: float = 0.0
    garbled: bool = False  # wrong answers also fail the SLM's validator
    slower: float = 1.0  # factor on its times


@dataclass(slots=True)
class Row:
    """The result of one request. Times in seconds; NaN where there was no answer."""

    at_s: float
    request: int
    chosen: str = ""  # SLM of the decision
    preferred: str = ""  # SLM that would have been chosen had all been hot
    slm: str = ""  # SLM that answered
    tried: tuple[str, ...] = ()
    hit: bool = True  # the chosen SLM was hot
    preferred_hot: bool = True
    path: str = ""
    exact: float = 0.0
    credit: float = 0.0
    ttft_s: float = float("nan")
    latency_s: float = float("nan")
    energy_j: float = float("nan")
    error: str = ""  # "", "shed", "unavailable", "failed", "late"


@dataclass
class Call:
    """A request in progress."""

    row: Row
    decision: Decision
    plan: list[str]
    position: int = 0
    full: set[str] = field(default_factory=set)
    state: SLMState | None = None
    load: tuple[float, ...] = ()


def error_outcome(call: Call, at_s: float) -> Outcome:
    """The outcome of a request without an answer."""
    shed = call.row.error == "shed"
    return make_outcome(
        call.decision.decision_id,
        at=at_s,
        slm_id=call.plan[-1],
        status="rejected" if shed else "error",
        http_status=429 if shed else 503,
        ttft_s=None,
        e2e_s=None,
        tpot_s=None,
        energy_j=None,
        output_tokens=0,
        numbers=(),
        buckets=(),
        load_features=(),
        predicted=None,
    )


def answer_outcome(
    call: Call,
    served: Served,
    signals: tuple[QualitySignal, ...],
    *,
    prompt: int,
    tokens: int,
    cold: bool,
) -> Outcome:
    """The outcome of an answered request, as `deployments.router.outcome.outcome_of` makes it."""
    row, decision = call.row, call.decision
    chosen = next((c for c in decision.candidates if c.slm_id == row.slm), None)
    return make_outcome(
        decision.decision_id,
        at=served.ended_s,
        slm_id=row.slm,
        path="fallback" if row.slm != decision.slm_id else str(decision.path),
        reason=str(decision.reason),
        rule=decision.rule,
        propensity=decision.propensity,
        retries=len(row.tried) - 1,
        replica_id=row.slm,
        predicted_replica=row.slm,
        cold=cold,
        ttft_s=row.ttft_s,
        e2e_s=row.latency_s,
        tpot_s=(served.ended_s - served.first_token_s) / (tokens - 1) if tokens > 1 else None,
        queue_s=served.started_s - served.arrived_s,
        prompt_tokens=prompt,
        output_tokens=tokens,
        energy_j=row.energy_j,
        numbers=decision.context.features.numbers,
        buckets=decision.context.features.buckets,
        load_features=call.load,
        load=load_at_decision(call.state) if call.state is not None else None,
        predicted=chosen.prediction if chosen else None,
        versions=decision.versions,
        signals=signals,
    )
