"""`calm predictors` and `calm replay`: what they request, print and refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from calm_serve.cli import main
from calm_serve.config import Goals
from calm_serve.protocol.outcomes import OUTCOME
from calm_serve.protocol.topics import (
    LiveComparison,
    PredictorChange,
    PredictorStatus,
    ShadowReport,
)
from tests.logged_decisions import serve

ENTRY = {
    "version": "lgbm-2",
    "source": "trained",
    "state": "champion",
    "created_at": 1000.0,
    "trained_on": 300,
    "metrics": {"log_loss": 0.31, "base_rate_log_loss": 0.6, "auc": None},
    "published_at": 1000.0,
    "note": "passed the promotion test",
}
STATUS = PredictorStatus(
    challenger="lgbm-3",
    pinned="lgbm-2",
    shadow=ShadowReport("lgbm-3", 12, 0.75, 0.1, (0.05, 0.15)),
    post_promotion=LiveComparison(60, 0.3, 0.4, 0.1, (0.02, 0.18), 0.03, 0.05, False),
    last_change=PredictorChange(5.0, "rolled_back", "lgbm-2", "lgbm-1", "log loss 0.9 against 0.3"),
)
DOCUMENT: dict[str, Any] = {
    "object": "list",
    "data": [ENTRY, ENTRY | {"version": "lgbm-1", "state": "rolled_back", "note": "worse"}],
    "last_training": {
        "reason": "better",
        "version": "lgbm-3",
        "against": "lgbm-2",
        "champion_loss": 0.5,
        "challenger_loss": 0.4,
        "difference_ci95": [0.02, 0.18],
        "held_out": 60,
        "then": "shadow",
    },
    **json.loads(json.dumps(asdict(STATUS))),
}


def run(*argv: str, answer: Mapping[str, Any] = DOCUMENT) -> tuple[int, list[tuple[str, Any]]]:
    seen: list[tuple[str, Any]] = []

    def fetch(url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        seen.append((url, body))
        return dict(answer)

    return main.main(argv, main.World(fetch=fetch)), seen


def test_models_shows_every_predictor_and_what_happened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, seen = run("predictors", "--url", "http://h:1/")
    assert (status, seen) == (0, [("http://h:1/v1/predictors", None)])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1].split()[:4] == ["lgbm-2", "(pinned)", "champion", "trained"]
    assert "rolled back" in lines[2]
    assert "lgbm-3 compared on 12 requests, agreement 0.75" in out
    assert "log loss 0.300, of the previous predictor 0.400" in out
    assert "rolled back lgbm-1 -> lgbm-2: log loss 0.9 against 0.3" in out
    verdict = "lgbm-3 against lgbm-2: better, log loss gain 0.1 [0.02, 0.18] on 60 labels; shadow"
    assert f"last training: {verdict}" in out


def test_predictors_shows_a_training_that_was_too_small_or_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = {"reason": "too_few_held_out", "version": "lgbm-4", "against": "lgbm-2"}
    few |= {"difference_ci95": None}
    run("predictors", answer=DOCUMENT | {"last_training": few})
    assert "last training: lgbm-4 against lgbm-2: too few held out\n" in capsys.readouterr().out
    run(
        "predictors", answer=DOCUMENT | {"last_training": {"reason": "failed", "detail": "no rows"}}
    )
    assert "last training: failed: no rows\n" in capsys.readouterr().out
    run("predictors", answer=DOCUMENT | {"last_training": {}})
    assert "last training" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "body"),
    [
        (["list"], None),
        (["pin", "lgbm-1"], {"action": "pin", "version": "lgbm-1"}),
        (["unpin"], {"action": "unpin"}),
        (["rollback"], {"action": "rollback"}),
    ],
)
def test_predictors_sends_the_change_to_the_service(
    capsys: pytest.CaptureFixture[str], argv: list[str], body: Any
) -> None:
    status, seen = run("predictors", *argv, "--json")
    assert status == 0
    assert seen == [(f"{main.DEFAULT_URL}/v1/predictors", body)]
    assert json.loads(capsys.readouterr().out) == DOCUMENT


@pytest.mark.parametrize("argv", [["pin"], ["rollback", "lgbm-1"]])
def test_a_version_is_for_pinning(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, seen = run("predictors", *argv)
    assert (status, seen) == (2, [])
    assert "VERSION" in capsys.readouterr().err


def test_an_answer_of_something_else_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predictors", answer={"data": [{}]})[0] == 1
    assert "does not look like" in capsys.readouterr().err


@pytest.fixture
def log(tmp_path: Path) -> str:
    path = tmp_path / "log.jsonl"
    outcomes = serve(60, Goals(exploration_ratio=0.2))
    path.write_bytes(b"".join(OUTCOME.encode(o) + b"\n" for o in outcomes))
    return str(path)


def test_replay_reproduces_and_estimates(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("replay", log, "--goals", '{"exploration_ratio": 0.2}')[0] == 0
    captured = capsys.readouterr()
    assert "60 outcomes, 60 scored decisions" in captured.out
    assert "reproduced: 100.00% of 60" in captured.out
    rows = {line.split()[0] for line in captured.out.splitlines() if line}
    assert {"reward", "quality", "e2e_s", "energy_j"} <= rows
    assert "clipped at 10" in captured.out
    assert captured.err == ""  # no progress without a terminal


def test_replay_takes_goals_from_a_configuration(
    log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "serve_config.yaml"
    goals = {"latency_weight_per_s": 3.0}
    applications = [{"args": {"id": "an-slm"}}, {"args": {"fleet": "f", "goals": goals}}]
    config.write_text(yaml.safe_dump({"applications": applications}))
    assert run("replay", log, "--goals", str(config), "--json")[0] == 0
    report = json.loads(capsys.readouterr().out)
    assert report["not_comparable"] == {"decided under other goals": 60}
    assert report["changed"] == sum(m["decisions"] for m in report["moved"]) > 0


@pytest.mark.parametrize(
    ("goals", "message"),
    [
        ('{"latncy": 1}', "latncy"),
        ("gone.yaml", "goals not found"),
        ("{[", "not YAML"),
        ('{"policy": {"name": "random"}}', "policy 'calm'"),
    ],
)
def test_replay_refuses_goals_that_are_none(
    log: str, goals: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("replay", log, "--goals", goals)[0] == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"applications: [{name: a, args: }]", "no application with args.fleet"),
        (b"applications: 3", "no application with args.fleet"),
        (b"\xff\xfe", "goals.yaml: not YAML"),
    ],
)
def test_replay_names_the_error_of_a_file_of_goals(
    log: str, tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "goals.yaml").write_bytes(content)
    assert run("replay", log, "--goals", str(tmp_path / "goals.yaml"))[0] == 2
    assert message in capsys.readouterr().err


def test_replay_makes_no_log_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "outcomes.sqlite"
    assert run("replay", f"sqlite:///{missing}", "--goals", "{}")[0] == 1
    assert "log not found" in capsys.readouterr().err
    assert not missing.exists()


def test_replay_refuses_a_predictor_and_a_log_that_are_none(
    log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("replay", log, "--goals", "{}", "--predictor", log)[0] == 2
    assert "log.jsonl: not a predictor" in capsys.readouterr().err
    assert run("replay", "gone.sqlite", "--goals", "{}")[0] == 1
    assert "log not found: gone.sqlite" in capsys.readouterr().err
