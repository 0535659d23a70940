"""Conversations: a tool loop never changes its SLM, a new topic may, if it gains enough."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.prediction import cached_prefill_s
from calm_serve.requests import Overrides, find_route, parse_chat
from calm_serve.routing.conversations import ConversationMemory, with_cached_history
from calm_serve.routing.selector import ModelSelector, assume_hot
from calm_serve.testing import (
    decision_for,
    make_context,
    make_fleet,
    make_goals,
    make_outcome,
    make_prediction,
    make_spec,
    make_state,
)
from calm_serve.types import (
    Decision,
    DecisionPath,
    DecisionReason,
    Prediction,
    Residency,
    RoutingContext,
    SLMState,
)

FLEET = make_fleet(
    make_spec("sql", capabilities={"tools": True}),
    make_spec("shell", capabilities={"tools": True}),
    make_spec("general", capabilities={"tools": True}),
    markers={"sql": "select", "shell": "bash"},
    rules=[
        {"name": "sql", "marker": "sql", "without": ["shell"], "slms": ["sql"]},
        {"name": "shell", "marker": "shell", "without": ["sql"], "slms": ["shell"]},
    ],
    safety=[{"name": "secret", "pattern": "password", "slm": "general"}],
)
CALL = {"id": "c", "type": "function", "function": {"name": "lookup", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "lookup"}}]
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "select: bash: not found"}
TOPIC = "Which ships are longer than 90 metres?"
FOLLOW_UP = "and longer than 120?"
Message = dict[str, Any]


class Oracle:
    """A predictor with fixed answers; `seen` are the SLMs that were last predicted."""

    version = "oracle-1"

    def __init__(self, **success: float) -> None:
        self.success = success

    def predict(self, context: RoutingContext, specs: Any, states: Any) -> list[Prediction]:
        return [make_prediction(s.id, success_ratio=self.success.get(s.id, 0.5)) for s in specs]

    def novelty(self, bits: Any) -> None:
        return None


class Talk:
    """A client's conversation with a selector; every answer is noted as the SLM's."""

    def __init__(self, target: ModelSelector, session: str = "") -> None:
        self.target, self.session = target, session
        self.messages: list[Message] = []
        self.count = 0

    def send(self, *messages: Message, **fields: Any) -> Decision:
        self.messages += messages
        self.count += 1
        body = {"messages": self.messages, **fields}
        headers = Overrides(session_id=self.session)
        return self.target.decide(parse_chat(body), headers, f"{id(self)} {self.count}")

    def ask(self, text: str, **fields: Any) -> Decision:
        return self.send(user(text), **fields)

    def answer(self, text: str = "There are three.") -> None:
        self.messages.append({"role": "assistant", "content": text})


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def make_selector(
    oracle: Oracle, states: dict[str, SLMState] | None = None, **goals: Any
) -> ModelSelector:
    known = states if states is not None else {}
    return ModelSelector(
        FLEET,
        make_goals(**goals),
        predictor=oracle,
        read_state=lambda spec: known.get(spec.id, assume_hot(spec)),
    )


def why(decision: Decision) -> tuple[str, str, str]:
    return decision.slm_id, decision.path, decision.reason


@pytest.mark.parametrize("exploration_ratio", [0.0, 0.5])
def test_a_tool_loop_never_changes_its_slm(exploration_ratio: float) -> None:
    oracle = Oracle(sql=0.9)
    for number in range(40):
        talk = Talk(make_selector(oracle, exploration_ratio=exploration_ratio))
        oracle.success = {"sql": 0.9, "general": 0.1}
        first = talk.ask(f"{number} {TOPIC}", tools=TOOLS)
        oracle.success = {"sql": 0.0, "general": 1.0}
        for _ in range(3):
            then = talk.send(CALLS, RESULT, tools=TOOLS)
            assert why(then) == (first.slm_id, DecisionPath.CONVERSATION, DecisionReason.TOOL_LOOP)


def test_a_tool_loop_stays_where_a_rule_or_its_floor_would_send_it_elsewhere() -> None:
    target = make_selector(Oracle(sql=0.9, general=0.95), quality_floor=0.92)
    talk = Talk(target)
    assert talk.ask(TOPIC, tools=TOOLS).slm_id == "general"
    assert talk.send(CALLS, RESULT, user("bash, please"), tools=TOOLS).slm_id == "general"
    assert talk.send(CALLS, RESULT, tools=TOOLS).path is DecisionPath.CONVERSATION


def test_a_tool_loop_waits_for_its_slm_to_wake_up() -> None:
    states: dict[str, SLMState] = {}
    talk = Talk(make_selector(Oracle(sql=0.9), states))
    talk.ask(TOPIC, tools=TOOLS)
    states["sql"] = make_state("sql", residency=Residency.ASLEEP, calibration_factor=0.1)
    then = talk.send(CALLS, RESULT, tools=TOOLS)
    assert why(then)[:2] == ("sql", DecisionPath.CONVERSATION)
    assert then.unscored == ("shell", "general")


def test_a_tool_loop_whose_slm_is_gone_is_decided_anew() -> None:
    states: dict[str, SLMState] = {}
    talk = Talk(make_selector(Oracle(sql=0.9, general=0.8), states))
    talk.ask(TOPIC, tools=TOOLS)
    states["sql"] = make_state("sql", breaker_open=True)
    assert talk.send(CALLS, RESULT, tools=TOOLS).slm_id == "general"


def test_a_tool_loop_that_this_router_has_not_seen_is_not_explored() -> None:
    target = make_selector(Oracle(sql=0.9), exploration_ratio=0.5)
    for number in range(40):
        talk = Talk(target)
        talk.messages = [user(f"{number} {TOPIC}")]
        assert talk.send(CALLS, RESULT, tools=TOOLS).slm_id == "sql"


def test_a_secret_in_a_tools_result_still_pins() -> None:
    talk = Talk(make_selector(Oracle(sql=0.9)))
    talk.ask(TOPIC, tools=TOOLS)
    assert talk.send(CALLS, {**RESULT, "content": "the password"}, tools=TOOLS).slm_id == "general"


def test_after_a_failover_the_tool_loop_stays_with_the_slm_that_answered() -> None:
    target = make_selector(Oracle(sql=0.9))
    talk = Talk(target)
    decision = talk.ask(TOPIC, tools=TOOLS)
    target.learn(decision, make_outcome(decision.decision_id, slm_id="shell", status="error"))
    assert target._conversations.find(decision.context.conversation_key, "") == "sql"
    target.learn(decision, make_outcome(decision.decision_id, slm_id="shell"))
    assert talk.send(CALLS, RESULT, tools=TOOLS).slm_id == "shell"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/messages",
            {
                "max_tokens": 9,
                "messages": [
                    user(TOPIC),
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "name": "f", "input": {}}],
                    },
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "content": "3"},
                            {"type": "text", "text": "A reminder: use bash."},
                        ],
                    },
                ],
            },
        ),
        (
            "/v1/responses",
            {
                "input": [
                    user(TOPIC),
                    {"type": "reasoning", "summary": []},
                    {"type": "function_call", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "output": "3"},
                ]
            },
        ),
    ],
)
def test_other_apis_have_tool_loops_too(path: str, body: dict[str, Any]) -> None:
    target = make_selector(Oracle(sql=0.9))
    assert Talk(target).ask(TOPIC).slm_id == "sql"
    decision = target.decide(find_route(path).parse(body), Overrides(), "id")
    assert why(decision) == ("sql", DecisionPath.CONVERSATION, DecisionReason.TOOL_LOOP)


def test_a_new_topic_may_change_the_slm() -> None:
    oracle = Oracle(sql=0.9)
    talk = Talk(make_selector(oracle))
    talk.ask(TOPIC)
    talk.answer()
    assert talk.ask("Which command lists all files? I use bash.").slm_id == "shell"
    talk.answer()
    oracle.success = {"general": 0.9}
    assert talk.ask("Tell me a story of a ship that was lost in the ice.").slm_id == "general"


def test_a_follow_up_stays() -> None:
    oracle = Oracle(sql=0.9)
    talk = Talk(make_selector(oracle))
    talk.ask(TOPIC)
    oracle.success = {"general": 0.9}
    for _ in range(2):
        talk.answer()
        then = talk.ask(FOLLOW_UP)
        assert why(then) == ("sql", DecisionPath.CONVERSATION, DecisionReason.FOLLOW_UP)
        assert then.unscored == ("shell", "general")


def test_a_follow_up_that_names_another_slm_goes_there() -> None:
    talk = Talk(make_selector(Oracle(sql=0.9)))
    talk.ask("select all ships")
    talk.answer()
    assert talk.ask("and now in bash").slm_id == "shell"


def test_a_follow_up_is_read_with_what_it_follows_where_the_slm_is_not_known() -> None:
    talk = Talk(make_selector(Oracle(general=0.9)))
    talk.messages = [user("select all ships")]
    talk.answer("SELECT * FROM ships")
    decision = talk.ask(FOLLOW_UP)
    assert why(decision) == ("sql", DecisionPath.RULE, DecisionReason.RULE_MATCH)


def test_a_follow_up_leaves_an_slm_below_the_floor_or_asleep() -> None:
    states: dict[str, SLMState] = {}
    oracle = Oracle(sql=0.9)
    target = make_selector(oracle, states)
    talk = Talk(target)
    talk.ask(TOPIC)
    talk.answer()
    states["sql"] = make_state("sql", residency=Residency.ASLEEP)
    oracle.success = {"general": 0.9}
    assert talk.ask(FOLLOW_UP).slm_id == "general"
    context = make_context(previous_slm="sql", follows_up=True, quality_floor=0.6)
    states.clear()
    assert decision_for(target, context).slm_id == "general"


def test_a_session_knows_the_slm_where_the_client_changed_its_history() -> None:
    target = make_selector(Oracle(sql=0.9))
    for session, slm_id in (("one", "sql"), ("", "general")):
        talk = Talk(target, session)
        talk.ask(TOPIC)
        talk.messages = [user("(summary) the client asked about ships")]
        target.predictor = Oracle(general=0.9)
        assert talk.send(CALLS, RESULT, tools=TOOLS).slm_id == slm_id
        target.predictor = Oracle(sql=0.9)


def test_a_system_prompt_with_the_time_of_day_does_not_hide_the_conversation() -> None:
    talk = Talk(make_selector(Oracle(sql=0.9)))
    talk.messages = [{"role": "system", "content": "It is 9:00."}]
    talk.ask(TOPIC, tools=TOOLS)
    talk.messages[0] = {"role": "system", "content": "It is 9:01."}
    assert talk.send(CALLS, RESULT).path is DecisionPath.CONVERSATION


def test_baselines_keep_no_conversation_together() -> None:
    talk = Talk(make_selector(Oracle(), policy={"name": "single", "slm": "general"}))
    talk.target._conversations.note(make_context(session_key="", conversation_key=1), "sql")
    context = make_context(previous_slm="sql", tool_loop=True)
    assert decision_for(talk.target, context).path is DecisionPath.BASELINE


def test_a_change_must_gain_more_than_the_lost_prefix_costs() -> None:
    spec = FLEET.slms[0]
    saved_s = cached_prefill_s(spec, assume_hot(spec), 900)
    assert saved_s > 0.1
    weight = 0.5

    def chosen(lead: float, history_tokens: int, **state: Any) -> str:
        states = {"sql": make_state("sql", **state)}
        oracle = Oracle(sql=0.5, general=0.5 + lead)
        target = make_selector(oracle, states, latency_weight_per_s=weight)
        context = make_context(
            previous_slm="sql", prompt_tokens=1000, history_tokens=history_tokens
        )
        return decision_for(target, context).slm_id

    cost = weight * min(saved_s, make_prediction().ttft_s)
    assert chosen(0.9 * cost, 900) == "sql"
    assert chosen(1.1 * cost, 900) == "general"
    assert chosen(0.9 * cost, 0) == "general"
    # What predictions expect to be cached anyway is not lost by a change.
    assert chosen(0.9 * cost, 900, cached_prefix_ratio=0.9) == "general"


def test_only_the_slm_of_the_conversation_saves_its_prefix() -> None:
    context = make_context(previous_slm="sql", prompt_tokens=100, history_tokens=10_000)
    spec, other = FLEET.slms[0], FLEET.slms[1]
    prediction = make_prediction("sql", ttft_s=9.0)
    saved = with_cached_history(prediction, context, spec, make_state("sql"))
    # No more than the prompt is cached.
    most_s = cached_prefill_s(spec, make_state("sql"), 100)
    assert 9.0 - saved.ttft_s == pytest.approx(most_s)
    elsewhere = make_prediction("shell")
    assert with_cached_history(elsewhere, context, other, make_state("shell")) == elsewhere


def test_the_memory_is_bounded_and_forgets_what_was_used_least_recently() -> None:
    memory = ConversationMemory(4)
    for number in range(1, 7):
        memory.note(make_context(conversation_key=number), f"slm-{number}")
        memory.note(make_context(conversation_key=1), "first")
    assert len(memory) == 4
    assert memory.find(1, "") == "first"
    assert memory.find(6, "") == "slm-6"
    assert memory.find(2, "") == ""
    memory.note(make_context(session_key="s"), "sql")
    assert memory.find(99, "s") == "sql"
