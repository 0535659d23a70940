"""The training child: a job in, a verdict or an error out, as versioned records."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge import training_process
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.knowledge.training_process import retrain_in_child
from calm_serve.learning import RETRAIN_JOB, RETRAIN_REPLY, RetrainJob, RetrainReply, RetrainResult
from calm_serve.learning.evaluation import Verdict, VerdictReason
from calm_serve.learning.training import train
from calm_serve.prediction import Artifact
from tests.knowledge_data import CODER, TALKER, make_world

SLMS = (CODER, TALKER)
VERDICT = Verdict(True, VerdictReason.BETTER, 0.6, 0.4, (0.1, 0.3), 50)


def store_of(folder: Path, count: int) -> str:
    url = f"sqlite:///{folder / 'outcomes.sqlite'}"
    store = OutcomeStore(url)
    store.append(make_world(count))
    store.close()
    return url


def run(monkeypatch: pytest.MonkeyPatch, job: bytes) -> bytes:
    """What the child's `main` writes, in this process."""
    out = io.BytesIO()
    monkeypatch.setattr(training_process, "NICENESS", 0)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(job)))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out))
    training_process.main()
    return out.getvalue()


async def test_a_child_trains_against_a_champion(tmp_path: Path) -> None:
    champion = train(
        make_world(60, truth=False), SLMS, seed=0, holdout_ratio=0.25, clock=lambda: 1.0
    )
    blob = champion.artifact.to_bytes()
    result = await retrain_in_child(RetrainJob(store_of(tmp_path, 300), SLMS, blob, 0.25))
    assert isinstance(result.verdict, Verdict)
    assert result.verdict.reason in VerdictReason
    assert result.blob is not None
    assert Artifact.from_bytes(result.blob).version == result.version


def test_what_cannot_be_trained_is_an_error_by_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = RetrainJob(store_of(tmp_path, 0), SLMS, None, 0.25)
    reply = RETRAIN_REPLY.decode(run(monkeypatch, RETRAIN_JOB.encode(job)))
    assert reply.result is None
    assert reply.error


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 2}, "retrain_job: version 2 was written by a newer program"),
        ({"record": {"slm_ids": []}}, "malformed retrain_job: store_url"),
    ],
)
def test_a_job_that_the_child_cannot_read_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], error: str
) -> None:
    document = json.loads(RETRAIN_JOB.encode(RetrainJob("sqlite://", SLMS, b"x", 0.25))) | change
    reply = RETRAIN_REPLY.decode(run(monkeypatch, json.dumps(document).encode()))
    assert reply.result is None
    assert error in reply.error


def test_a_reply_of_a_newer_program_is_refused() -> None:
    reply = RetrainReply(RetrainResult(VERDICT, {"auc": 0.9}, "v1", b"\0blob"))
    written = RETRAIN_REPLY.encode(reply)
    assert RETRAIN_REPLY.decode(written) == reply
    with pytest.raises(KnowledgeError, match="newer program"):
        RETRAIN_REPLY.decode(json.dumps(json.loads(written) | {"version": 2}))


def test_a_verdict_is_shown_as_plain_data_with_the_fields_it_always_had() -> None:
    document = RetrainResult(VERDICT, {"auc": 0.9}, "v1", None).document("")
    assert type(document["reason"]) is str
    assert json.loads(json.dumps(document)) == {
        "publish": True,
        "reason": "better",
        "champion_loss": 0.6,
        "challenger_loss": 0.4,
        "difference_ci95": [0.1, 0.3],
        "held_out": 50,
        "value_difference": None,
        "value_difference_ci95": None,
        "value_rows": 0,
        "explored": 0,
        "means_difference_ci95": None,
        "means_value_difference": None,
        "version": "v1",
        "against": "base_rate",
        "metrics": {"auc": 0.9},
    }
