"""Request bodies and routing headers: what is read, what is refused, and with which parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json

from calm_serve.errors import RequestError
from calm_serve.requests import ROUTES
from calm_serve.requests.openai import parse_chat, parse_completion
from calm_serve.requests.overrides import Overrides
from calm_serve.requests.parsed import MAX_CHOICES, MAX_STOPS, MAX_TOOLS
from calm_serve.requests.transcript import MAX_MESSAGES
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import make_fleet, make_goals, make_spec
from calm_serve.types import OutputShape

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
CONTENT: st.SearchStrategy[Any] = JSON_VALUES | st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url", "input_audio", "tool_use", [], None])},
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
        "n": JSON_VALUES,
        "input": MESSAGES | JSON_VALUES,
        "instructions": JSON_VALUES,
        "text": JSON_VALUES,
        "system": JSON_VALUES,
        "query": JSON_VALUES,
        "documents": JSON_VALUES,
        "tokens": JSON_VALUES,
        "functions": JSON_VALUES,
        "truncate_prompt_tokens": JSON_VALUES,
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
    kinds = [make_spec("vectors", task="embed"), make_spec("ranks", task="rerank")]
    selector = ModelSelector(make_fleet(make_spec("small"), *kinds), make_goals())
    for route in ROUTES.values():
        try:
            decision = selector.decide(route.parse(body), Overrides(), "id")
        except RequestError as error:
            assert 400 <= error.http_status < 500
            assert error.message
        else:
            assert decision.slm_id in selector.specs


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
    assert (parsed.last_user, parsed.needs) == ("what\nis it", ("chat", "vision"))


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
        ({"response_format": {"type": "structural_tag", "format": {}}}, OutputShape.GUIDED),
        ({"guided_json": {"type": "object"}}, OutputShape.GUIDED),
        ({"functions": [{"name": "f"}]}, OutputShape.TOOLS),
        ({"functions": [{"name": "f"}], "function_call": "none"}, OutputShape.TEXT),
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
        ({"messages": [{"role": 5, "content": "x"}]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [user("x")] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": [user(5)]}, "messages[0].content"),
        ({"messages": [user([5])]}, "messages[0].content"),
        ({"messages": [user([{"type": "text", "text": 1}])]}, "messages[0].content"),
        (chat(model=7), "model"),
        (chat(stream="yes"), "stream"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=True), "max_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(max_tokens=2**31), "max_tokens"),
        (chat(max_completion_tokens=0), "max_completion_tokens"),
        (chat(n=0), "n"),
        (chat(n=MAX_CHOICES + 1), "n"),
        (chat(stop=["x"] * (MAX_STOPS + 1)), "stop"),
        (chat(tools=[{}] * (MAX_TOOLS + 1)), "tools"),
        (chat(model="m" * 300), "model"),
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


def test_the_newer_name_of_the_output_limit_wins() -> None:
    assert parse_chat(chat(max_completion_tokens=5, max_tokens=9)).max_output_tokens == 5
    assert parse_chat(chat(max_completion_tokens=None, max_tokens=9)).max_output_tokens == 9


@pytest.mark.parametrize("number", [5, 5.0, "5"])
def test_integers_are_read_as_vllm_reads_them(number: Any) -> None:
    parsed = parse_chat(chat(max_tokens=number, n=number))
    assert (parsed.max_output_tokens, parsed.choices) == (5, 5)


def test_numbers_are_read_as_json_reads_them() -> None:
    # The HTTP edge parses with pydantic: what it accepts must not surprise the decision.
    body = from_json(json.dumps(chat(max_tokens=16)).replace("16", "1" + "0" * 400))
    with pytest.raises(RequestError, match="max_tokens"):
        parse_chat(body)


# ---------------------------------------------------------------- what vLLM's messages may contain


@pytest.mark.parametrize("role", ["developer", "tool", "function", "ipython", "context", "a b"])
def test_roles_that_a_chat_template_may_know_pass(role: str) -> None:
    parsed = parse_chat(chat(user("hello"), {"role": role, "content": "x"}))
    assert parsed.text.startswith("\x02user\x03hello\x02")
    assert parsed.last_user == "hello"


@pytest.mark.parametrize(
    ("part", "need"),
    [
        ({"type": "image_url", "image_url": {"url": "data:"}}, "vision"),
        ({"type": "input_image", "image_url": "data:"}, "vision"),
        ({"type": "image_embeds", "image_embeds": "x"}, "vision"),
        ({"image_url": "data:"}, "vision"),
        ({"type": "input_audio", "input_audio": {}}, "audio"),
        ({"type": "audio_url", "audio_url": {}}, "audio"),
        ({"type": "video_url", "video_url": {}}, "video"),
        ({"type": "file", "file": {"file_id": "1"}}, ""),
        ({"type": "tool_reference", "name": "t"}, ""),
        ({"type": "a_part_of_tomorrow", "text": "x"}, ""),
        ({"type": "text", "text": None}, ""),
        ({"type": 5}, ""),
        ({}, ""),
    ],
)
def test_a_part_needs_what_it_contains_and_unknown_parts_pass(
    part: dict[str, Any], need: str
) -> None:
    parsed = parse_chat(chat(user([{"type": "text", "text": "see"}, part])))
    assert parsed.needs == tuple(sorted({"chat", *([need] if need else [])}))
    assert parsed.last_user == "see"


@pytest.mark.parametrize(
    "part",
    [
        "hello",
        {"type": "text", "text": "hello"},
        {"type": "input_text", "text": "hello"},
        {"type": "output_text", "text": "hello"},
        {"type": "refusal", "refusal": "hello"},
        {"type": "thinking", "thinking": "hello"},
    ],
)
def test_every_kind_of_text_part_is_read(part: Any) -> None:
    assert parse_chat(chat(user([part]))).last_user == "hello"


@pytest.mark.parametrize("content", [..., None, "", []])
def test_tool_calls_count_as_text_beside_any_content(content: Any) -> None:
    call = {"function": {"name": "tide", "arguments": '{"day": 3}'}}
    assistant = {"role": "assistant", "tool_calls": [call]}
    if content is not ...:
        assistant["content"] = content
    parsed = parse_chat(chat(user("go"), assistant, {"role": "tool", "content": "2.4 m"}))
    assert parsed.text == '\x02user\x03go\x02assistant\x03\ntide {"day": 3}\x02tool\x032.4 m'


def test_no_text_can_pass_for_the_start_of_a_message() -> None:
    parsed = parse_chat(chat(user("my \x02password\x03 is")))
    assert parsed.text == "\x02user\x03my  password\x03 is"
    assert "\x02" not in parse_completion({"prompt": "my \x02password\x03 is"}).text
    assert "\x02" not in parse_completion({"prompt": ["a", "b\x02c\x03"]}).text


def test_a_header_that_changes_with_every_request_is_left_out_of_the_prefix() -> None:
    texts = {
        parse_chat(
            chat({"role": "system", "content": f"x-anthropic-billing-header: {i}\nBe brief."})
        ).text
        for i in range(3)
    }
    assert texts == {"\x02system\x03Be brief."}


# ---------------------------------------------------------------- tools and forms of the answer

TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, "none"),
        ({"tools": []}, "none"),
        ({"tools": None, "tool_choice": "auto"}, "none"),
        ({"tools": TOOLS}, "auto"),
        ({"tools": TOOLS, "tool_choice": None}, "auto"),
        ({"tools": TOOLS, "tool_choice": "none"}, "none"),
        ({"tools": TOOLS, "tool_choice": "required"}, "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "named"),
        ({"functions": TOOLS, "function_call": {"name": "f"}}, "named"),
    ],
)
def test_the_choice_of_tools_is_read(fields: dict[str, Any], choice: str) -> None:
    parsed = parse_chat(chat(**fields))
    assert (parsed.tool_choice, parsed.wants_tools) == (choice, choice != "none")
    assert ("tools" in parsed.needs) == parsed.wants_tools


def test_tools_with_a_response_format_need_both() -> None:
    parsed = parse_chat(chat(tools=TOOLS, response_format={"type": "json_object"}))
    assert parsed.needs == ("chat", "json_output", "tools")
    assert parsed.output_shape is OutputShape.TOOLS


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"guided_regex": "a+"}, ("guided_regex",)),
        ({"guided_json": {}, "guided_choice": ["a"]}, ("guided_choice",)),
        ({"functions": TOOLS}, ("functions",)),
        ({"functions": TOOLS, "tools": TOOLS}, ()),
        ({"guided_json": None}, ()),
    ],
)
def test_fields_that_vllm_does_not_read_any_more_are_noted(
    fields: dict[str, Any], ignored: tuple[str, ...]
) -> None:
    assert parse_chat(chat(**fields)).ignored_fields == ignored


SCHEMA_CASES: list[tuple[Any, bool]] = [
    ({"type": "object"}, True),
    ({"$ref": "#"}, False),
    ({"$ref": "#/"}, False),
    (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        False,
    ),
    ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, False),
    ({"anyOf": [{"$ref": "#"}]}, False),
    ({"anyOf": [{"$ref": "#"}, {"type": "string"}]}, True),
    ({"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, False),
    (
        {
            "$defs": {
                "a": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]},
                "b": {"$ref": "#/$defs/a"},
            },
            "$ref": "#/$defs/b",
        },
        True,
    ),
    (
        {
            "$defs": {"n": {"type": "object", "properties": {"kid": {"$ref": "#/$defs/n"}}}},
            "$ref": "#/$defs/n",
        },
        True,
    ),
    ({"$ref": "https://example.org/schema"}, True),
    ({"properties": {"$ref": {"type": "string"}}}, True),
    ({"$ref": "#/$defs/missing"}, True),
]


@pytest.mark.parametrize(("schema", "is_grounded"), SCHEMA_CASES)
def test_a_schema_that_refers_to_nothing_but_itself_is_refused(
    schema: dict[str, Any], is_grounded: bool
) -> None:
    for fields in (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": schema},
            }
        },
        {"structured_outputs": {"json": schema}},
    ):
        if is_grounded:
            parse_chat(chat(**fields))
            continue
        with pytest.raises(RequestError, match="refers to nothing but itself") as caught:
            parse_chat(chat(**fields))
        assert caught.value.param in fields


def test_the_size_and_the_depth_of_a_schema_are_bounded() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(70):
        deep = {"items": deep}
    wide = {"properties": {f"p{i}": {"type": "string"} for i in range(12_000)}}
    for schema in (deep, wide):
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        with pytest.raises(RequestError, match="levels") as caught:
            parse_chat(chat(response_format=wanted))
        assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    "wanted",
    [{"schema": {"type": "object"}}, {"json_schema": None}, {"json_schema": {"name": "x"}}],
)
def test_a_json_schema_without_its_envelope_is_left_to_the_engine(wanted: dict[str, Any]) -> None:
    parsed = parse_chat(chat(response_format={"type": "json_schema", **wanted}))
    assert parsed.output_shape is OutputShape.JSON_SCHEMA


# ---------------------------------------------------------------- text completions


@pytest.mark.parametrize(
    "prompt", [None, "", [], 5, {"a": 1}, ["a", 1], [[]], [[1], "a"], [[1], ["a"]], [1.5], [None]]
)
def test_a_completion_takes_texts_or_token_ids(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion({"prompt": prompt})
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("prompt", ["tell me", ["tell me"]])
def test_a_completion_prompt_is_its_own_last_user_message(prompt: Any) -> None:
    parsed = parse_completion({"prompt": prompt})
    assert (parsed.text, parsed.last_user, parsed.turns) == ("tell me", "tell me", 1)
    assert (parsed.needs, parsed.choices) == ((), 1)


def test_each_prompt_of_a_list_is_a_sequence_of_its_own() -> None:
    parsed = parse_completion({"prompt": ["four", "seventeen chars.."], "n": 3})
    assert (parsed.choices, parsed.sequence_chars) == (6, 17)


def test_token_ids_are_counted_exactly_and_have_no_text() -> None:
    one = parse_completion({"prompt": [20, 21, 22, 23]})
    assert (one.text, one.is_token_ids, one.input_tokens) == ("", True, 4)
    two = parse_completion({"prompt": [[20, 21], [5, 6, 7]]})
    assert (two.input_tokens, two.sequence_tokens, two.choices) == (5, 3, 2)
    assert one.prefix.startswith(two.prefix)


def test_prompts_may_be_encoded_embeddings() -> None:
    parsed = parse_completion({"prompt_embeds": "AAAA"})
    assert (parsed.is_token_ids, parsed.input_tokens, parsed.prefix) == (True, None, "AAAA")


def test_a_prompt_can_be_scored_without_generating() -> None:
    assert parse_completion({"prompt": "x", "max_tokens": 0, "echo": True}).max_output_tokens == 0
    assert parse_completion({"prompt": "x"}).max_output_tokens == 16
    with pytest.raises(RequestError, match="max_tokens"):
        parse_completion({"prompt": "x", "max_tokens": -1})


@pytest.mark.parametrize(("limit", "read"), [(64, 64), (-1, -1), (None, None), ("x", None)])
def test_the_length_to_which_the_engine_cuts_is_read(limit: Any, read: int | None) -> None:
    assert parse_chat(chat(truncate_prompt_tokens=limit)).truncate_tokens == read
    body = {"prompt": "x", "truncate_prompt_tokens": limit}
    assert parse_completion(body).truncate_tokens == read
