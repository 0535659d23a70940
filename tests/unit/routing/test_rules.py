"""Stage 1: every condition a rule states must hold, and the first match wins."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.config import Rule
from calm_serve.routing.rules import first_match, matches, rule_target_is_usable
from calm_serve.testing import make_context, make_state
from calm_serve.types import OutputShape, Residency


def rule(name: str = "r", **conditions: Any) -> Rule:
    return Rule(name=name, slms=("small",), **conditions)


@pytest.mark.parametrize(
    ("conditions", "fields", "expected"),
    [
        ({}, {}, True),
        ({"marker": "sql"}, {"markers": ("code", "sql")}, True),
        ({"marker": "sql"}, {"markers": ("code",)}, False),
        ({"without": ("code",)}, {"markers": ("sql",)}, True),
        ({"without": ("sql", "code")}, {"markers": ("code",)}, False),
        ({"output_shape": "json"}, {"output_shape": OutputShape.JSON}, True),
        ({"output_shape": "json"}, {"output_shape": OutputShape.JSON_SCHEMA}, False),
        ({"language": "de"}, {"language": "de"}, True),
        ({"language": "de"}, {"language": "und"}, False),
        ({"min_prompt_chars": 400}, {"prompt_chars": 400}, True),
        ({"min_prompt_chars": 401}, {"prompt_chars": 400}, False),
        ({"max_prompt_chars": 400}, {"prompt_chars": 400}, True),
        ({"max_prompt_chars": 399}, {"prompt_chars": 400}, False),
        ({"marker": "sql", "language": "de"}, {"markers": ("sql",), "language": "en"}, False),
        ({"marker": "sql", "language": "de"}, {"markers": ("sql",), "language": "de"}, True),
    ],
)
def test_a_rule_matches_when_all_its_conditions_hold(
    conditions: dict[str, Any], fields: dict[str, Any], expected: bool
) -> None:
    assert matches(rule(**conditions), make_context(**fields)) is expected


def test_the_first_of_several_matching_rules_wins() -> None:
    rules = (rule("a", marker="sql"), rule("b"), rule("c"))
    found = first_match(rules, make_context())
    assert found is not None
    assert found.name == "b"


def test_no_rule_is_a_valid_answer() -> None:
    assert first_match((rule(marker="sql"),), make_context()) is None
    assert first_match((), make_context()) is None


def test_a_rules_slm_is_usable_while_it_is_awake_and_about_as_good_as_usual() -> None:
    assert rule_target_is_usable(make_state())
    assert not rule_target_is_usable(make_state(calibration_factor=0.4))
    assert not rule_target_is_usable(make_state(residency=Residency.ASLEEP))
    assert not rule_target_is_usable(make_state(residency=Residency.COLD, replicas=0))
