"""Anthropic's Messages: the order of the text, tools, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.errors import RequestError
from calm_serve.requests.anthropic import parse_count_tokens, parse_messages
from calm_serve.types import OutputShape

TOOL = {"name": "tide", "input_schema": {"type": "object"}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def body(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "max_tokens": 10,
        "messages": list(messages) or [{"role": "user", "content": "hello"}],
        **fields,
    }


@pytest.mark.parametrize(
    "system",
    [
        "be brief",
        [text("be "), text("brief")],
        [text("x-anthropic-billing-header: 7"), text("be brief")],
    ],
)
def test_the_system_prompt_comes_first_as_vllm_joins_it(system: Any) -> None:
    parsed = parse_messages(body(system=system))
    assert parsed.text == "\x02system\x03be brief\x02user\x03hello"
    assert parsed.system_chars == 8


def test_results_of_tools_become_messages_before_the_rest_of_theirs() -> None:
    turns = [
        {"role": "user", "content": "how high?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "1", "name": "tide", "input": {"d": 3}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "is it much?"},
                {"type": "tool_result", "content": [text("2 m")]},
                {"type": "a_block_of_tomorrow"},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "content": "3 m"}]},
    ]
    parsed = parse_messages(body(*turns))
    assert parsed.text == (
        "\x02user\x03how high?\x02assistant\x03I look.\ntide {'d': 3}\x02tool\x032 m"
        "\x02user\x03is it much?\x02tool\x033 m"
    )
    assert (parsed.last_user, parsed.turns) == ("is it much?", 2)


def test_images_are_noticed_in_messages_and_in_results() -> None:
    image = {"type": "image", "source": {"type": "base64", "data": ""}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [image]}
    for block in (image, result):
        assert "vision" in parse_messages(body({"role": "user", "content": [block]})).needs


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, "none"),
        ({"tools": [TOOL]}, "auto"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "tide"}}, "named"),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, "none"),
        ({"tool_choice": {"type": "auto"}}, "none"),
    ],
)
def test_the_choice_of_tools_is_read(fields: dict[str, Any], choice: str) -> None:
    parsed = parse_messages(body(**fields))
    assert (parsed.tool_choice, "tools" in parsed.needs) == (choice, choice != "none")


def test_a_schema_for_the_answer_is_read() -> None:
    schema = {"type": "object"}
    config = {"format": {"type": "json_schema", "schema": schema}}
    parsed = parse_messages(body(output_config=config))
    assert (parsed.output_shape, parsed.schema) == (OutputShape.JSON_SCHEMA, schema)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"system": 5}, "system"),
        ({"stop_sequences": ["x"] * 100}, "stop_sequences"),
    ],
)
def test_a_wrong_body_is_refused_with_the_parameter_named(
    changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_messages(body(**changes))
    assert caught.value.param == param
    # Anthropic's errors have no field for the parameter.
    assert param in caught.value.message


def test_counting_needs_no_limit_and_generates_nothing() -> None:
    asked = body(system="be brief", tools=[TOOL])
    del asked["max_tokens"]
    parsed = parse_count_tokens(asked)
    assert (parsed.tokenizer_only, parsed.max_output_tokens) == (True, 0)
    assert parsed.needs == ("chat",)
    assert parsed.text == parse_messages(body(system="be brief")).text
