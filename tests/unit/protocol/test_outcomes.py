"""Outcomes between processes and versions: batches, single rows, rows of version 1."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.errors import KnowledgeError
from calm_serve.protocol.outcomes import OUTCOME, VERSION, check, decode_batch, encode_batch
from calm_serve.testing import change_outcome, make_outcome
from calm_serve.types import (
    DecisionSummary,
    DecisionTerms,
    EngineFacts,
    LoadAtDecision,
    LoggedCandidate,
    Outcome,
    Prediction,
    PredictorVersion,
    PromptFeatures,
    QualitySignal,
    ServiceLevel,
    ShadowChoice,
    Timing,
    Versions,
    Weights,
)
from deployments.knowledge.outcome_outbox import read_spool
from tests.unit.protocol.strategies import records

# As version 1 wrote it to a spool file, one line each.
FLAT: dict[str, Any] = {
    "outcome_id": "d1",
    "at": 1000.0,
    "slm_id": "small",
    "adapter": "en",
    "path": "explored",
    "reason": "exploration",
    "rule": "",
    "propensity": 0.25,
    "status": "ok",
    "http_status": 200,
    "retries": 1,
    "predicted_replica": "r0",
    "served_replica": "r1",
    "cold": True,
    "ttft_s": 0.05,
    "e2e_s": 0.15,
    "tpot_s": None,
    "decision_s": 0.0003,
    "prompt_tokens": 100,
    "cached_tokens": 48,
    "output_tokens": 10,
    "energy_j": 1.5,
    "energy_source": "rapl",
    "task": "sql",
    "numbers": [1.0, 2.5],
    "buckets": [3, 7],
    "load": [0.5, 0.25],
    "predicted": [0.5, 64.0, 0.05, 0.01, 6.4],
    "versions": ["A+new-x+shipped", "g", "f"],
    "signals": [{"source": "feedback", "value": 1.0, "at": 1001.0}],
    "prompt": "how many?",
    "queue_s": 0.002,
    "extra": {
        "candidates": [
            ["small", 0.5, 64.0, 0.05, 0.01, 6.4, 1, 0.8, 0.25, 0.4],
            ["large", 0.7, 64.0, 0.1, 0.02, 9.6, 0, 1, 0.3, 0.6],
        ],
        "weights": [0.02, 0.001, 0.01, 1.5],
        "slo": [250.0, None, 4.0],
        "floor": 0.3,
        "left_out": 2,
        "load_met": [3.0, 6, 1.5],
        "preferred": "large",
        "preferred_hot": False,
        "shadow": {
            "version": "B",
            "slm_id": "large",
            "agrees": False,
            "success": 0.45,
            "gain": 0.05,
        },
    },
}
TYPED = Outcome(
    outcome_id="d1",
    slm_id="small",
    at=1000.0,
    adapter="en",
    retries=1,
    predicted_replica="r0",
    task="sql",
    decision=DecisionSummary(
        path="explored",
        reason="exploration",
        propensity=0.25,
        versions=Versions(PredictorVersion("A", "new-x", shipped=True), "g", "f"),
        predicted=Prediction("small", 0.5, 64.0, 0.05, 0.01, 6.4),
        load_features=(0.5, 0.25),
        load=LoadAtDecision(running=3.0, in_flight=6, ttft_ratio=1.5),
        terms=DecisionTerms(
            candidates=(
                LoggedCandidate(
                    Prediction("small", 0.5, 64.0, 0.05, 0.01, 6.4, 0.25, 0.4), True, 0.8
                ),
                LoggedCandidate(
                    Prediction("large", 0.7, 64.0, 0.1, 0.02, 9.6, 0.3, 0.6), False, 1.0
                ),
            ),
            weights=Weights(0.02, 0.001, 0.01, 1.5),
            left_out=2,
            slo=ServiceLevel(ttft_ms=250.0, deadline_s=4.0),
            quality_floor=0.3,
        ),
        preferred="large",
        preferred_hot=False,
        shadow=ShadowChoice("B", "large", agrees=False, success_ratio=0.45, gain=0.05),
    ),
    features=PromptFeatures((1.0, 2.5), (3, 7)),
    timing=Timing(ttft_s=0.05, e2e_s=0.15, decision_s=0.0003, cold=True),
    engine=EngineFacts(
        "r1", 100, 48, 10, queue_s=0.002, ttft_s=0.0, energy_j=1.5, energy_source="rapl"
    ),
    signals=(QualitySignal("feedback", 1.0, 1001.0),),
    prompt_text="how many?",
)


def flat(**changes: Any) -> dict[str, Any]:
    """A row of version 1; None as a change takes the field away."""
    row = {**deepcopy(FLAT), **changes}
    return {name: value for name, value in row.items() if name not in changes or value is not None}


def batch(*rows: Any, **changes: Any) -> bytes:
    document = {"format": "outcomes", "version": VERSION, "record": list(rows), **changes}
    return json.dumps(document).encode()


def plain(outcome: Outcome) -> Any:
    """The row as in a batch."""
    return json.loads(encode_batch([outcome]))["record"][0]


def test_a_row_of_version_1_becomes_the_right_records() -> None:
    assert OUTCOME.from_plain(FLAT) == TYPED
    assert OUTCOME.decode(json.dumps(FLAT)) == TYPED


def test_a_row_of_version_1_may_lack_what_had_a_default() -> None:
    found = OUTCOME.from_plain(flat(signals=None, prompt=None, queue_s=None, extra=None))
    assert found == change_outcome(
        TYPED,
        signals=(),
        prompt_text=None,
        queue_s=None,
        load=None,
        terms=None,
        preferred="",
        preferred_hot=None,
        shadow=None,
    )


def test_a_row_of_version_1_that_predicted_nothing_has_no_prediction() -> None:
    found = OUTCOME.from_plain(flat(path="rule", rule="sql", predicted=[], extra={}))
    assert found.decision.predicted is None
    assert found.decision.terms is None
    assert found.decision.rule == "sql"


def test_candidates_of_version_1_without_an_slo_have_the_usual_spreads() -> None:
    extra = {
        "candidates": [row[:8] for row in FLAT["extra"]["candidates"]],
        "weights": FLAT["extra"]["weights"],
    }
    terms = OUTCOME.from_plain(flat(extra=extra)).decision.terms
    assert terms is not None
    assert {(c.prediction.ttft_spread, c.prediction.e2e_spread) for c in terms.candidates} == {
        (0.5, 0.5)
    }
    assert (terms.slo, terms.left_out, terms.quality_floor) == (ServiceLevel(), 0, 0.0)


def test_all_weights_of_version_1_are_read() -> None:
    weights = [0.02, 0.001, 0.01, 1.5, 0.5, 1.0, 0.25, 4.0]
    extra = {**FLAT["extra"], "weights": weights}
    terms = OUTCOME.from_plain(flat(extra=extra)).decision.terms
    assert terms is not None
    assert terms.weights == Weights(*weights)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("prior", PredictorVersion("prior")),
        ("A", PredictorVersion("A")),
        ("A+shipped", PredictorVersion("A", shipped=True)),
        ("A+new-x", PredictorVersion("A", "new-x")),
        ("A+new-x+shipped", PredictorVersion("A", "new-x", shipped=True)),
    ],
)
def test_a_predictors_version_of_version_1_is_taken_apart(
    text: str, version: PredictorVersion
) -> None:
    found = OUTCOME.from_plain(flat(versions=[text, "g", "f"])).decision.versions
    assert found == Versions(version, "g", "f")
    assert str(found.predictor) == text


@pytest.mark.parametrize(
    "change",
    [
        {"outcome_id": None},
        {"slm_id": None},
        {"at": "yesterday"},
        {"versions": [1, 2, 3]},
        {"versions": "A"},
        {"versions": None},
        {"predicted": 5},
        {"predicted": ["likely"]},
        {"numbers": 5},
        {"extra": 5},
        {"extra": {"load_met": [1.0]}},
        {"extra": {"load_met": 5}},
        {"extra": {"shadow": "B"}},
        {"extra": {"shadow": {"version": "B"}}},
        {"extra": {"candidates": [["small"]], "weights": [1.0, 1.0, 1.0]}},
        {"extra": {"candidates": 5, "weights": [1.0, 1.0, 1.0]}},
        {"extra": {**FLAT["extra"], "weights": [1.0]}},
        {"extra": {**FLAT["extra"], "slo": [1.0]}},
    ],
)
def test_a_malformed_row_of_version_1_is_refused_and_no_crash(change: dict[str, Any]) -> None:
    with pytest.raises(KnowledgeError, match="malformed outcome"):
        OUTCOME.from_plain(flat(**change))


def test_a_spool_file_contains_rows_of_both_versions(tmp_path: Path) -> None:
    spool = tmp_path / "router.jsonl"
    lines = [
        json.dumps(FLAT).encode(),
        json.dumps(flat(outcome_id="odd", versions=[1, 2, 3])).encode(),
        OUTCOME.encode(make_outcome("new")),
        b'{"outcome_id": "cut',
    ]
    spool.write_bytes(b"\n".join(lines))
    assert read_spool(spool) == [TYPED, make_outcome("new")]


@given(st.lists(records(Outcome, finite=True), max_size=3))
def test_outcomes_come_back_from_a_batch_as_they_were(outcomes: list[Outcome]) -> None:
    assert decode_batch(encode_batch(outcomes)) == (outcomes, {})


@given(records(Outcome, finite=True))
def test_a_row_of_a_batch_is_the_row_of_a_spool_file(outcome: Outcome) -> None:
    assert plain(outcome) == json.loads(OUTCOME.encode(outcome))["record"]


def test_a_batch_of_version_1_rows_is_read() -> None:
    assert decode_batch(batch(FLAT, version=1)) == ([TYPED], {})


def test_a_malformed_row_is_refused_alone() -> None:
    bad = {**plain(make_outcome("bad")), "at": "yesterday"}
    good = plain(make_outcome("good"))
    outcomes, refused = decode_batch(batch(bad, 5, {}, good))
    assert outcomes == [make_outcome("good")]
    assert set(refused) == {"bad", "row 1", "row 2"}
    assert "malformed outcome: at:" in refused["bad"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "where"),
    [
        ("at", "at"),
        ("ttft_s", "ttft_s"),
        ("energy_j", "energy_j"),
        ("propensity", "propensity"),
        ("numbers", "numbers"),
        ("load_features", "load_features"),
        ("predicted", "success_ratio"),
        ("load", "running"),
        ("terms", "calibration_factor"),
        ("shadow", "gain"),
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_name(field: str, where: str, bad: float) -> None:
    values: dict[str, Any] = {
        "numbers": (1.0, bad),
        "load_features": (bad,),
        "predicted": Prediction("small", bad, 1.0, 1.0, 1.0, 1.0),
        "load": LoadAtDecision(bad, 1, 1.0),
        "terms": DecisionTerms(
            (LoggedCandidate(Prediction("small", 0.5, 1.0, 1.0, 1.0, 1.0), True, bad),),
            Weights(1.0, 1.0, 1.0),
        ),
        "shadow": ShadowChoice("B", "small", True, 0.5, bad),
    }
    row = make_outcome("bad", **{field: values.get(field, bad)})
    outcomes, refused = decode_batch(encode_batch([row, make_outcome("good")]))
    assert outcomes == [make_outcome("good")]
    assert refused == {"bad": f"malformed outcome: {where} is not finite"}


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_signal_out_of_bounds_is_refused(value: float) -> None:
    row = make_outcome("bad", signals=(QualitySignal("feedback", value),))
    _, refused = decode_batch(encode_batch([row]))
    assert refused["bad"].startswith("malformed outcome: ")
    with pytest.raises(KnowledgeError):
        check(row)


@pytest.mark.parametrize("field", ["output_tokens", "retries"])
def test_an_integer_that_no_column_holds_is_refused(field: str) -> None:
    rows = [make_outcome("bad", **{field: 2**63}), make_outcome("good")]
    outcomes, refused = decode_batch(encode_batch(rows))
    assert outcomes == [make_outcome("good")]
    assert refused == {"bad": f"malformed outcome: {field} is above 2147483647"}


def test_large_finite_numbers_are_not_taken_for_infinity() -> None:
    row = make_outcome("a", numbers=(1e308, 1e308))
    assert check(row) is row


def test_a_batch_of_a_newer_program_is_refused_as_a_whole() -> None:
    with pytest.raises(KnowledgeError) as refused:
        decode_batch(batch(plain(make_outcome()), version=VERSION + 1))
    assert f"version {VERSION + 1} was written by a newer program" in refused.value.message
    assert f"up to {VERSION}" in refused.value.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"5",
        b"{}",
        batch(version=0),
        batch(version="2"),
        batch(version=None),
        batch(format="outcome"),
        batch(record=None),
        batch(record={"outcome_id": "a"}),
        batch(record="rows"),
    ],
)
def test_what_is_not_a_batch_is_refused_as_a_whole(data: bytes) -> None:
    with pytest.raises(KnowledgeError, match="outcomes: not a batch"):
        decode_batch(data)


def test_a_text_that_utf8_cannot_encode_does_not_block_its_batch() -> None:
    odd = make_outcome("odd", prompt_text="half \ud800 a character", task="\udfff")
    good = make_outcome("good", prompt_text="¿qué? \0")
    clean = change_outcome(odd, prompt_text="half ? a character", task="?")
    assert decode_batch(encode_batch([odd, good])) == ([clean, good], {})
    assert OUTCOME.decode(OUTCOME.encode(odd)) == clean
