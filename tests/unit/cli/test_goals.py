"""`calm goals` shows the goals of a service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from calm_serve.cli import main
from calm_serve.goals.controller import GoalController
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import make_decision, make_fleet, make_goals, make_outcome
from deployments.router.admin.goals import goals_section


def answer(**more: Any) -> dict[str, Any]:
    goals = make_goals(ttft_p95_s=1.0, min_quality=0.9)
    selector = ModelSelector(make_fleet(), goals, controller=GoalController(goals))
    selector.learn(make_decision("small", "large"), make_outcome(ttft_s=0.25))
    return {
        "goals": selector.goals.model_dump(mode="json"),
        **goals_section(selector),
        "changed": {"at": 0.0, "by": "ann", "revision": 3},
        **more,
    }


def shown(
    capsys: pytest.CaptureFixture[str], found: dict[str, Any], *arguments: str
) -> tuple[int, str, list[str]]:
    asked = []

    def fetch(url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        asked.append(url)
        return found

    status = main.main(["goals", "--url", "http://x/", *arguments], main.World(fetch=fetch))
    return status, capsys.readouterr().out, asked


def test_targets_and_weights_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, asked = shown(capsys, answer())
    lines = [line.split() for line in text.splitlines()]
    assert (status, asked) == (0, ["http://x/v1/goals"])
    assert ["ttft_p95_s", "1", "0.25", "yes", "-", "1"] in lines
    assert ["min_quality", "0.9", "0.5", "no", "-", "1"] in lines
    assert ["latency_per_s", "0.1", "0.1"] in lines
    assert "set by ann at 1970-01-01 00:00:00+00:00" in text
    assert "WHO" not in text


def test_history_is_requested_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    change = {"at": 1.0, "by": "bob", "old": None, "new": {"min_quality": 0.9}, "revision": 1}
    _, text, asked = shown(capsys, answer(history=[change]), "--history", "5")
    assert asked == ["http://x/v1/goals?history=5"]
    assert text.splitlines()[-1].split() == [
        "1970-01-01",
        "00:00:01+00:00",
        "bob",
        "min_quality=0.9",
    ]


def test_a_service_without_targets_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no target is set" in shown(capsys, answer(targets=[]))[1]


def test_the_answer_of_something_else_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, {"hello": 1})[0] == 1


def test_every_weight_of_a_decision_is_in_the_answer() -> None:
    selector = ModelSelector(make_fleet(), make_goals())
    assert goals_section(selector)["weights"] == asdict(selector.weights)
