"""Precision of the reference fleet's rules, and its conversations."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from calm_serve.config import Goals, load_fleet
from calm_serve.prediction import LightGBMPredictor, MetadataPrior, load_artifact
from calm_serve.routing import ModelSelector
from deployments.reference_fleet.grading.conversations import (
    FOLLOW_UPS,
    LINES,
    SIDES,
    SYSTEM_PROMPTS,
    build,
    load_conversations,
)
from load_tests.common.workloads import standard
from load_tests.routing.rules_precision import (
    OTHER_TURN,
    RulePrecision,
    conversation_accuracy,
    rule_precision,
)

FLEET = Path(__file__).parents[3] / "deployments/fleets/reference.yaml"
MIN_PRECISION = 0.98


@cache
def selector() -> ModelSelector:
    fleet = load_fleet(FLEET)
    predictor = LightGBMPredictor(
        load_artifact(Path(fleet.predictor) / "predictor.bin"), MetadataPrior()
    )
    return ModelSelector(fleet, Goals(exploration_ratio=0.0), predictor=predictor)


@pytest.mark.parametrize("named", [None, "answer", *SYSTEM_PROMPTS])
def test_the_rules_are_right_whatever_comes_before_the_users_message(named: str | None) -> None:
    before = {None: (), "answer": OTHER_TURN}.get(
        named, [{"role": "system", "content": SYSTEM_PROMPTS.get(named, "")}]
    )
    workload = standard()[:400]
    alone, found = (rule_precision(selector(), workload, b) for b in ((), before))
    assert found == alone
    assert found.precision_ratio >= MIN_PRECISION
    assert found.decided > 50


def test_precision_counts_only_what_rules_decide() -> None:
    assert RulePrecision(10, 4, 3).precision_ratio == 0.75
    assert RulePrecision(10, 4, 3).share_ratio == 0.4
    assert RulePrecision(10, 0, 0).precision_ratio == 1.0


def test_the_file_of_conversations_is_what_its_generator_writes() -> None:
    assert list(build()) == load_conversations()


def test_conversations_are_balanced_over_tasks_kinds_and_sides() -> None:
    found = load_conversations()
    assert len(found) == len(FOLLOW_UPS) * len(SIDES) * 4 * LINES
    assert all(c.slm != c.holder for c in found if c.kind == "topic_change")
    assert all(c.slm == c.holder for c in found if c.kind in ("tool_loop", "follow_up"))


def test_known_conversations_keep_their_tool_loops_and_follow_ups() -> None:
    conversations = [c for c in load_conversations() if c.side == "workload"]
    known = conversation_accuracy(selector(), conversations, known=True)
    new = conversation_accuracy(selector(), conversations, known=False)
    assert known["tool_loop"] == 1.0
    assert known["follow_up"] >= 0.9
    assert new["follow_up"] >= 0.35  # read alone: 0.13
    # A change of topic is decided as well as in a router that knows no conversation.
    assert known["topic_change"] >= new["topic_change"] - 0.03
    assert known["system_prompt"] == new["system_prompt"]
