"""Stage 1: ordered declarative rules from the fleet file; the first match names the short list."""

from __future__ import annotations

from calm_serve.config import Rule
from calm_serve.types import Residency, RoutingContext, SLMState

# A rule promises that its SLM can do the job. Once less than this share of the usual successes
# is left, the request is scored like any other.
MIN_CALIBRATION_FACTOR = 0.5


def matches(rule: Rule, context: RoutingContext) -> bool:
    """True when every condition the rule states holds; a rule with none always matches."""
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
    """Whether an SLM that a rule names is awake and answers about as well as it used to.

    One that must be woken first is weighed against those that need not.
    """
    return state.calibration_factor >= MIN_CALIBRATION_FACTOR and state.residency is Residency.HOT


def first_match(rules: tuple[Rule, ...], context: RoutingContext) -> Rule | None:
    """The first rule that matches, or None."""
    for rule in rules:
        if matches(rule, context):
            return rule
    return None
