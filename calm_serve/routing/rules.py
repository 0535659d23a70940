"""Stage 1: declarative rules of the fleet file in order; the first match gives the candidates."""

from __future__ import annotations

from calm_serve.config import Rule
from calm_serve.types import Residency, RoutingContext, SLMState

# A rule asserts that its SLM can answer. When the SLM's calibration factor (measured over predicted
# successes) falls below this, the request is scored instead.
MIN_CALIBRATION_FACTOR = 0.5


def matches(rule: Rule, context: RoutingContext) -> bool:
    """Return whether all conditions of the rule are met; a rule without any always matches."""
    if rule.marker and rule.marker not in context.markers:
        return False
    if rule.without and not set(rule.without).isdisjoint(context.markers):
        return False
    if rule.output_shape and rule.output_shape != context.output_shape:
        return False
    if rule.language and rule.language != context.language:
        return False
    if context.prompt_chars < rule.min_prompt_chars:
        return False
    return not rule.max_prompt_chars or context.prompt_chars <= rule.max_prompt_chars


def rule_target_is_usable(state: SLMState) -> bool:
    """Return whether an SLM that a rule names is hot and its calibration factor is high enough.

    If it has to be woken first, the request is scored over all candidates instead.
    """
    return state.calibration_factor >= MIN_CALIBRATION_FACTOR and state.residency is Residency.HOT


def first_match(rules: tuple[Rule, ...], context: RoutingContext) -> Rule | None:
    """Return the first rule that matches, or None."""
    for rule in rules:
        if matches(rule, context):
            return rule
    return None
