"""Precision and share of the reference fleet's rules, and what conversations do to the choice.

Both ask the decision core, without a service. A rule is right when it names the SLM that owns the
request: the specialist of its task, or the generalist for chat, prose and two requests at once. The
precision is the share of the right ones among the decisions of rules; the share is that of rules
among all decisions. Every request is also sent after system prompts that name other specialists,
and after an answer in another SLM's format; neither may change what the rules say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from calm_serve.requests import Overrides, parse_chat
from calm_serve.routing import ModelSelector
from calm_serve.types import DecisionPath
from deployments.reference_fleet.grading.conversations import (
    GENERALIST,
    SYSTEM_PROMPTS,
    Conversation,
)
from load_tests.common.workloads import Request

# A user's message with an answer in the format of each kind of specialist.
OTHER_TURN = (
    {"role": "user", "content": "How tall is it?"},
    {
        "role": "assistant",
        "content": '{"intent": "measure"}\nSELECT height FROM table\nfind / -name "*.sql" | bash\n'
        "First step by step: 3 + 4 = 7",
    },
)


@dataclass(frozen=True)
class RulePrecision:
    """What the rules did with labelled requests."""

    requests: int
    decided: int  # by a rule
    right: int  # of those

    @property
    def share_ratio(self) -> float:
        """Share of the requests that a rule decides."""
        return self.decided / max(self.requests, 1)

    @property
    def precision_ratio(self) -> float:
        """Share of the rules' decisions that name the owner; 1 without any."""
        return self.right / self.decided if self.decided else 1.0


def owner(task: str, slms: Iterable[str]) -> str:
    """The SLM that owns requests of a task: its specialist, else the generalist."""
    return task if task in slms else GENERALIST


def rule_precision(
    selector: ModelSelector,
    workload: Sequence[Request],
    before: Sequence[dict[str, str]] = (),
) -> RulePrecision:
    """Decide every request, with the messages `before` it, and count the rules' decisions."""
    decided = right = 0
    for number, request in enumerate(workload):
        body = {"messages": [*before, *request.messages]}
        decision = selector.decide(parse_chat(body), Overrides(), f"rules {number}")
        if decision.path is DecisionPath.RULE:
            decided += 1
            right += decision.slm_id == owner(request.row.task, selector.specs)
    return RulePrecision(len(workload), decided, right)


def conversation_accuracy(
    selector: ModelSelector, conversations: Sequence[Conversation], *, known: bool
) -> dict[str, float]:
    """Share of the decisions that name the SLM whose turn it is, by kind of conversation.

    With `known` the router has answered the turns before, by the SLM that wrote the last answer.
    """
    counts: dict[str, list[bool]] = {}
    for number, conversation in enumerate(conversations):
        if known and conversation.holder:
            _answer_before(selector, conversation, number)
        request = parse_chat({"messages": conversation.messages})
        if not known:  # as in a router that has not seen the conversation
            request = replace(request, parent_key=0)
        decision = selector.decide(request, Overrides(), f"conversation {number}")
        counts.setdefault(conversation.kind, []).append(decision.slm_id == conversation.slm)
    return {kind: sum(right) / len(right) for kind, right in sorted(counts.items())}


def figures(
    selector: ModelSelector, workload: Sequence[Request], conversations: Sequence[Conversation]
) -> dict[str, float]:
    """All figures, by name, as the benchmark writes them."""
    found: dict[str, float] = {}
    befores = {
        "alone": (),
        **{
            f"after_{name}_system_prompt": ({"role": "system", "content": text},)
            for name, text in SYSTEM_PROMPTS.items()
        },
        "after_another_answer": OTHER_TURN,
    }
    for name, before in befores.items():
        rules = rule_precision(selector, workload, before)
        found[f"rules.{name}.precision"] = round(rules.precision_ratio, 4)
        found[f"rules.{name}.share"] = round(rules.share_ratio, 4)
    for known in (True, False):
        accuracy = conversation_accuracy(selector, conversations, known=known)
        for kind, ratio in accuracy.items():
            found[f"multi_turn.{'known' if known else 'new'}.{kind}"] = round(ratio, 4)
    return found


def _answer_before(selector: ModelSelector, conversation: Conversation, number: int) -> None:
    """Let the SLM of the last answer be named for the turn that it answered."""
    roles = [message["role"] for message in conversation.messages]
    last_answer = len(roles) - 1 - roles[::-1].index("assistant")
    body = {"model": conversation.holder, "messages": conversation.messages[:last_answer]}
    selector.decide(parse_chat(body), Overrides(), f"before {number}")
