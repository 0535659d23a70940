"""Stage 1: what names SLMs without a prediction: the conversation, and rules of the fleet file.

Rules are declarative, and in order: the first match gives the candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from calm_serve.config import Rule
from calm_serve.types import (
    DecisionPath,
    DecisionReason,
    Residency,
    RoutingContext,
    SLMState,
)

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


@dataclass(frozen=True, slots=True)
class Named:
    """SLMs that a rule or the conversation names."""

    path: DecisionPath
    reason: DecisionReason
    slms: tuple[str, ...]
    rule: str = ""

    @property
    def in_tool_loop(self) -> bool:
        """Whether the request must stay with the SLM that called the tool."""
        return self.reason is DecisionReason.TOOL_LOOP

    def may_answer(self, state: SLMState) -> bool:
        """Whether an SLM in this state may answer; a tool loop even wakes its SLM."""
        return self.in_tool_loop or rule_target_is_usable(state)


def claims(rules: tuple[Rule, ...], context: RoutingContext, *, may_stay: bool) -> Iterator[Named]:
    """Yield what names SLMs for a request, the strongest claim first.

    With `may_stay` the SLM of the conversation's last answer keeps its tool loops, and follow-ups
    for which no rule names another SLM.
    """
    stays = (context.previous_slm,) if context.previous_slm and may_stay else ()
    if stays and context.tool_loop:
        yield Named(DecisionPath.CONVERSATION, DecisionReason.TOOL_LOOP, stays)
    rule = first_match(rules, context)
    if rule is not None:
        yield Named(DecisionPath.RULE, DecisionReason.RULE_MATCH, rule.slms, rule.name)
    if stays and context.follows_up:
        yield Named(DecisionPath.CONVERSATION, DecisionReason.FOLLOW_UP, stays)
