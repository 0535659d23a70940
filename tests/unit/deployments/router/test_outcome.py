"""The durable row of a call: what it repeats, what it measures, what it leaves empty."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from calm_serve.errors import (
    CalmError,
    CapacityError,
    NoCandidateError,
    RequestError,
    RouterFullError,
    SLMUnavailableError,
)
from calm_serve.protocol.outcomes import decode_batch, encode_batch
from calm_serve.testing import (
    FakeClock,
    make_context,
    make_decision,
    make_facts,
    make_prediction,
    make_state,
)
from calm_serve.types import (
    Candidate,
    Decision,
    DecisionPath,
    LoadAtDecision,
    PromptFeatures,
    QualitySignal,
)
from calm_serve.upstreams import Failure, FailureKind, UpstreamError
from deployments.router.dispatch import Call
from deployments.router.outcome import RefusedLog, outcome_of, refused, refused_outcome
from deployments.wire import ReplyEnd


def started(decision: Decision | None = None) -> Call:
    return Call(decision or make_decision("a", "b"), make_state("a"), (1.0, 2.0))


def finished(call: Call, **facts: Any) -> Call:
    call.slm_id = call.slm_id or call.decision.slm_id
    call.status, call.http_status = "ok", 200
    call.end = ReplyEnd(b"", make_facts("r1", **facts), (QualitySignal("validator:json", 1.0),))
    return call


def test_the_outcome_repeats_decision_facts_and_signals() -> None:
    decision = make_decision(
        "a", "b", context=make_context(request_id="d1", features=PromptFeatures((1.0,), (2,)))
    )
    call = finished(started(replace(decision, propensity=0.3)), cached_tokens=64, queue_s=0.2)
    call.predicted_replica = "r0"
    outcome = outcome_of(call, at=5.0, task="sql", prompt="text")
    assert (outcome.outcome_id, outcome.at, outcome.task, outcome.prompt_text) == (
        "d1",
        5.0,
        "sql",
        "text",
    )
    assert (outcome.slm_id, outcome.decision.path, outcome.decision.propensity) == (
        "a",
        "scored",
        0.3,
    )
    assert (outcome.predicted_replica, outcome.engine.replica_id) == ("r0", "r1")
    assert (outcome.features.numbers, outcome.features.buckets, outcome.decision.load_features) == (
        (1.0,),
        (2,),
        (1.0, 2.0),
    )
    assert outcome.decision.predicted == make_prediction("a")
    assert outcome.decision.versions == decision.versions
    assert (outcome.engine.cached_tokens, outcome.engine.queue_s, outcome.engine.energy_j) == (
        64,
        0.2,
        1.0,
    )
    assert [s.source for s in outcome.signals] == ["validator:json"]


def test_the_outcome_has_the_load_at_the_decision_its_request_included() -> None:
    call = finished(started(make_decision("a")))
    call.state = make_state("a", running=4, waiting=2, replicas=2, in_flight=11, ttft_ratio=1.25)
    outcome = outcome_of(call, at=0.0, task="", prompt=None)
    assert outcome.decision.load == LoadAtDecision(running=4.0, in_flight=12, ttft_ratio=1.25)


def test_the_first_token_of_a_stream_is_timed_here_and_of_one_piece_in_the_engine() -> None:
    streaming = make_decision("a", context=make_context(stream=True))
    call = finished(started(streaming), ttft_s=0.7)
    call.first_byte_s = 0.2
    assert outcome_of(call, at=0.0, task="", prompt=None).timing.ttft_s == 0.2
    call = finished(started(make_decision("a")), ttft_s=0.7)
    call.first_byte_s = 0.2
    assert outcome_of(call, at=0.0, task="", prompt=None).timing.ttft_s == 0.7


def test_a_call_that_never_reached_an_slm_still_has_an_outcome() -> None:
    outcome = outcome_of(started(), at=0.0, task="", prompt=None)
    assert (outcome.slm_id, outcome.status, outcome.engine.replica_id) == ("a", "error", "")
    assert (
        outcome.engine.energy_j,
        outcome.engine.queue_s,
        outcome.timing.ttft_s,
        outcome.timing.tpot_s,
    ) == (None,) * 4
    assert outcome.signals == ()


def test_an_slm_without_a_prediction_leaves_it_empty() -> None:
    ruled = make_decision("a", candidates=(Candidate("a"),), path=DecisionPath.RULE)
    assert outcome_of(started(ruled), at=0.0, task="", prompt=None).decision.predicted is None
    other = make_decision("a", candidates=(Candidate("b", prediction=make_prediction("b")),))
    assert outcome_of(started(other), at=0.0, task="", prompt=None).decision.predicted is None


@pytest.mark.parametrize(("replicas", "cold"), [(0, True), (1, False)])
def test_a_cold_start_is_known_from_the_state_at_the_decision(replicas: int, cold: bool) -> None:
    call = Call(make_decision("a"), make_state("a", replicas=replicas), ())
    assert outcome_of(call, at=0.0, task="", prompt=None).timing.cold is cold


def test_a_full_service_logs_each_kind_once_a_second_with_the_number_of_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    refused = RefusedLog(clock)
    with caplog.at_level("WARNING"):
        for number in range(100):
            refused.add("router_full", f"d{number}", "no place")
        refused.add("no_slm", "e", "none is there")
        clock.advance(1.0)
        refused.add("router_full", "d100", "no place")
    assert [record.getMessage() for record in caplog.records] == [
        "request d0 refused: router_full: no place",
        "request e refused: no_slm: none is there",
        "request d100 refused: router_full: no place (and 99 more since the last such line)",
    ]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (NoCandidateError("no SLM can take this"), True),
        (SLMUnavailableError("no SLM is available"), True),
        (RouterFullError("full"), False),
        (RequestError("wrong"), False),
    ],
)
def test_a_refused_request_has_an_outcome_if_it_says_something_of_the_fleet(
    error: CalmError, kept: bool
) -> None:
    found = refused_outcome("d", error, at=5.0, task="sql", took_s=0.1)
    assert (found is not None) is kept
    if found is not None:
        assert (found.slm_id, found.http_status) == ("", error.http_status)
        assert decode_batch(encode_batch([found])) == ([found], {})


@pytest.mark.parametrize(
    ("error", "begun", "status"),
    [
        (CapacityError("full"), False, "rejected"),
        (SLMUnavailableError("no SLM can take it now"), False, "rejected"),
        (UpstreamError(Failure(FailureKind.OUT_OF_TIME, "late")), True, "rejected"),
        (UpstreamError(Failure(FailureKind.INVALID_REQUEST, "bad")), True, "error"),
        (UpstreamError(Failure(FailureKind.TIMED_OUT, "silent")), False, "error"),
    ],
)
def test_only_what_speaks_against_the_slm_is_an_error(
    error: CalmError, begun: bool, status: str
) -> None:
    call = started()
    call.first_byte_s = 0.1 if begun else None
    refused(call, error)
    assert (call.status, call.failure_text) == (status, error.message)
