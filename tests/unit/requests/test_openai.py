"""Request bodies and routing headers: what is read, what is refused, and with which parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json

from calm_serve.errors import RequestError
from calm_serve.requests.openai import parse_chat, parse_completion, parse_overrides
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import make_fleet, make_goals
from calm_serve.types import OutputShape

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
CONTENT = JSON_VALUES | st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url", "audio", None])},
        optional={"text": JSON_VALUES},
    )
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "assistant", "tool", "nobody", 1, None]),
            "content": CONTENT,
        },
    )
    | JSON_VALUES,
    max_size=4,
)
# Bodies that look right but for one thing reach further than arbitrary JSON does.
BODIES = JSON_VALUES | st.fixed_dictionaries(
    {},
    optional={
        "model": JSON_VALUES | st.sampled_from(["auto", "small", "small:x", ":x", "nope"]),
        "messages": MESSAGES | JSON_VALUES,
        "prompt": JSON_VALUES,
        "stream": JSON_VALUES,
        "max_tokens": JSON_VALUES,
        "max_completion_tokens": JSON_VALUES,
        "tools": JSON_VALUES,
        "tool_choice": JSON_VALUES,
        "response_format": JSON_VALUES
        | st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "json_object", "json_schema", "xml"])},
            optional={"json_schema": JSON_VALUES},
        ),
        "structured_outputs": JSON_VALUES,
    },
)


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages) or [user("hello")], **fields}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@given(BODIES)
@example({"messages": [user("\ud800")]})
@example({"messages": [user("hello")], "max_tokens": 10**400})
@example({"prompt": "hello", "max_completion_tokens": 0})
@example({"messages": [user("hello")], "model": ":adapter"})
def test_any_json_value_is_decided_or_refused_with_a_request_error(body: Any) -> None:
    selector = ModelSelector(make_fleet(), make_goals())
    for parse in (parse_chat, parse_completion):
        try:
            decision = selector.decide(parse(body), parse_overrides({}), "id")
        except RequestError as error:
            assert 400 <= error.http_status < 500
            assert error.message
        else:
            assert decision.slm_id in selector.specs


@given(st.dictionaries(st.sampled_from(["x-slo-ttft-ms", "x-calm-labels"]) | st.text(), st.text()))
def test_any_headers_parse_or_raise_a_request_error(headers: dict[str, str]) -> None:
    try:
        overrides = parse_overrides(headers)
    except RequestError as error:
        assert error.param
    else:
        assert all(label == label.strip() != "" for label in overrides.labels)


def test_roles_and_contents_are_kept_in_order() -> None:
    parsed = parse_chat(
        chat(
            {"role": "system", "content": "be brief"},
            user("one"),
            {"role": "assistant", "content": "1"},
            user("two"),
        )
    )
    assert parsed.text == "\x02system\x03be brief\x02user\x03one\x02assistant\x031\x02user\x03two"
    assert (parsed.last_user, parsed.turns, parsed.system_chars) == ("two", 2, 8)


def test_a_chat_without_a_user_message_is_read_by_its_last_message() -> None:
    parsed = parse_chat(chat({"role": "system", "content": "greet"}))
    assert parsed.last_user.endswith("greet")


def test_text_parts_are_joined_and_images_noticed() -> None:
    parts = [
        {"type": "text", "text": "what"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "text", "text": "is it"},
    ]
    parsed = parse_chat(chat(user(parts)))
    assert (parsed.last_user, parsed.has_image) == ("what\nis it", True)


def test_messages_of_a_tool_loop_need_no_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert parse_chat(chat(user("go"), call, {"role": "tool"})).turns == 1


def test_the_model_defaults_to_the_routers_choice() -> None:
    assert {parse_chat(chat(**m)).model for m in ({}, {"model": ""}, {"model": "auto"})} == {"auto"}


def test_parameters_that_the_decision_does_not_read_are_passed_over() -> None:
    more = {"temperature": "hot", "brand_new_parameter": {"a": 1}}
    assert parse_chat(chat(user("hi"), **more)) == parse_chat(chat(user("hi")))


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, OutputShape.TEXT),
        ({"response_format": {"type": "text"}}, OutputShape.TEXT),
        ({"response_format": {"type": "json_object"}}, OutputShape.JSON),
        ({"response_format": {"type": "json_schema"}}, OutputShape.JSON_SCHEMA),
        ({"tools": [{"type": "function"}]}, OutputShape.TOOLS),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, OutputShape.TEXT),
        ({"tools": []}, OutputShape.TEXT),
        ({"structured_outputs": {"regex": "a+"}}, OutputShape.GUIDED),
        ({"structured_outputs": {"regex": None}}, OutputShape.TEXT),
    ],
)
def test_the_output_shape_is_what_the_client_asked_for(
    fields: dict[str, Any], shape: OutputShape
) -> None:
    assert parse_chat(chat(**fields)).output_shape is shape


def test_a_schema_is_taken_out_of_its_envelope() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert parse_chat(chat(response_format=wanted)).schema == schema


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0]"),
        ({"messages": [user("x"), {"role": "user"}]}, "messages[1].content"),
        ({"messages": [user(5)]}, "messages[0].content"),
        ({"messages": [user([{"type": "audio"}])]}, "messages[0].content"),
        ({"messages": [user([{"type": "text", "text": 1}])]}, "messages[0].content"),
        (chat(model=7), "model"),
        (chat(stream="yes"), "stream"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=True), "max_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(max_tokens=2**31), "max_tokens"),
        (chat(max_completion_tokens=0), "max_completion_tokens"),
        (chat(max_completion_tokens=-1, max_tokens=5), "max_completion_tokens"),
        (chat(response_format={"type": "xml"}), "response_format"),
        (chat(response_format="json"), "response_format"),
    ],
)
def test_a_wrong_chat_is_refused_with_the_parameter_named(body: Any, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(body)
    assert caught.value.param == param
    assert caught.value.http_status == 400


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [1, 2], 5, {"a": 1}])
def test_a_completion_takes_one_string(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion({"prompt": prompt})
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("prompt", ["tell me", ["tell me"]])
def test_a_completion_prompt_is_its_own_last_user_message(prompt: Any) -> None:
    parsed = parse_completion({"prompt": prompt})
    assert (parsed.text, parsed.last_user, parsed.turns) == ("tell me", "tell me", 1)


def test_the_newer_name_of_the_output_limit_wins() -> None:
    assert parse_chat(chat(max_completion_tokens=5, max_tokens=9)).max_output_tokens == 5
    assert parse_chat(chat(max_completion_tokens=None, max_tokens=9)).max_output_tokens == 9


def test_headers_become_overrides() -> None:
    overrides = parse_overrides(
        {
            "x-session-id": "s" * 300,
            "x-slo-ttft-ms": "250",
            "x-slo-tpot-ms": "12.5",
            "x-calm-deadline-s": "3",
            "x-calm-quality-floor": "0.7",
            "x-calm-data-policy": "local",
            "x-calm-task": "t" * 100,
            "x-calm-validate": "label",
            "x-calm-labels": " yes, no,,",
            "accept": "*/*",
        }
    )
    assert len(overrides.session_id) == 256
    assert (overrides.slo_ttft_ms, overrides.slo_tpot_ms) == (250.0, 12.5)
    assert (overrides.deadline_s, overrides.quality_floor) == (3.0, 0.7)
    assert overrides.local_only
    assert len(overrides.task) == 64
    assert (overrides.validate, overrides.labels) == ("label", ("yes", "no"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-slo-ttft-ms", "soon"),
        ("x-slo-ttft-ms", "-1"),
        ("x-slo-tpot-ms", "inf"),
        ("x-calm-deadline-s", "nan"),
        ("x-calm-quality-floor", "1.1"),
        ("x-calm-data-policy", "secret"),
        ("x-calm-validate", "poem"),
    ],
)
def test_a_header_out_of_range_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_overrides({name: value})
    assert caught.value.param == name


def test_an_unknown_routing_header_names_the_nearest_one() -> None:
    with pytest.raises(RequestError, match="nearest is 'x-calm-quality-floor'"):
        parse_overrides({"x-calm-quality": "0.5"})


def test_numbers_are_read_as_json_reads_them() -> None:
    # The HTTP edge parses with pydantic: what it accepts must not surprise the decision.
    body = from_json(json.dumps(chat(max_tokens=16)).replace("16", "1" + "0" * 400))
    with pytest.raises(RequestError, match="max_tokens"):
        parse_chat(body)
