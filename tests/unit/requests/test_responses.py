"""OpenAI's Responses, of a service that keeps none."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.errors import RequestError
from calm_serve.requests.responses import parse_responses
from calm_serve.types import OutputShape

TOOL = {"type": "function", "name": "f", "parameters": {}}


def test_instructions_precede_the_input() -> None:
    parsed = parse_responses({"instructions": "be brief", "input": "hello"})
    assert parsed.text == "\x02system\x03be brief\x02user\x03hello"
    assert (parsed.last_user, parsed.system_chars, parsed.turns) == ("hello", 8, 1)


def test_items_are_read_in_their_order() -> None:
    items = [
        {"role": "developer", "content": "rules"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "how high?"}],
        },
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "1", "name": "tide", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "2.4 m"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "2"}]},
        {"type": "an_item_of_tomorrow", "data": 1},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]},
    ]
    parsed = parse_responses({"input": items})
    assert parsed.text == (
        "\x02developer\x03rules\x02user\x03how high?\x02assistant\x03\x02assistant\x03\ntide {}"
        "\x02tool\x032.4 m\x02assistant\x032\x02assistant\x03\x02user\x03"
    )
    assert parsed.needs == ("chat", "vision")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ],
)
def test_what_needs_stored_responses_is_refused_by_its_name(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError, match="keeps no responses") as caught:
        parse_responses({"input": "hello", **fields})
    assert (caught.value.param, caught.value.http_status) == (param, 400)


@pytest.mark.parametrize(
    "fields",
    [{}, {"store": True}, {"store": False}, {"store": None}, {"background": False},
     {"previous_response_id": None}],
)  # fmt: skip
def test_store_is_accepted_with_any_value(fields: dict[str, Any]) -> None:
    assert parse_responses({"input": "hello", **fields}).last_user == "hello"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["hello"]}, "input[0]"),
        ({"input": "x", "instructions": 5}, "instructions"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "x", "stream": "yes"}, "stream"),
    ],
)
def test_a_wrong_body_is_refused_with_the_parameter_named(body: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_responses(body)
    assert caught.value.param == param


def test_the_form_of_the_answer_has_no_envelope() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "name": "n", "schema": schema}
    parsed = parse_responses({"input": "x", "text": {"format": wanted}})
    assert (parsed.output_shape, parsed.schema) == (OutputShape.JSON_SCHEMA, schema)
    assert parsed.needs == ("chat", "json_output")


@pytest.mark.parametrize(
    ("choice", "read"),
    [(None, "auto"), ("auto", "auto"), ("none", "none"), ("required", "required"),
     ({"type": "function", "name": "f"}, "named")],
)  # fmt: skip
def test_the_choice_of_tools_is_read(choice: Any, read: str) -> None:
    parsed = parse_responses({"input": "x", "tools": [TOOL], "tool_choice": choice})
    assert parsed.tool_choice == read
    assert ("tools" in parsed.needs) == (read != "none")


def test_truncation_makes_any_prompt_fit() -> None:
    assert parse_responses({"input": "x", "truncation": "auto"}).truncate_tokens == -1
    assert parse_responses({"input": "x", "truncation": "disabled"}).truncate_tokens is None
