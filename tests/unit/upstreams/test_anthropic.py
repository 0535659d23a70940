"""Anthropic's dialect: chat completions there and back, checked with both vendors' types."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from anthropic.types import Message
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter, ValidationError

from calm_serve.upstreams.answers import StreamReader
from calm_serve.upstreams.anthropic import (
    DEFAULT_MAX_TOKENS,
    ChatStream,
    chat_answer,
    messages_body,
)
from calm_serve.upstreams.error_documents import Origin
from calm_serve.upstreams.events import Event, EventScanner
from calm_serve.upstreams.failures import FailureKind, UpstreamError
from calm_serve.upstreams.kinds import Api
from tests.unit.upstreams.streams import event, messages_stream

USER = {"role": "user", "content": "hi"}
CALL = {
    "id": "call:1.a",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
}


def translated(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return messages_body({"model": "claude", "messages": list(messages), **fields}, "cloud")[0]


def refused(*messages: dict[str, Any], **fields: Any) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        translated(*(messages or [USER]), **fields)
    return caught.value


def text(found: str) -> dict[str, Any]:
    return {"type": "text", "text": found}


def test_a_plain_question() -> None:
    assert translated(USER, max_tokens=9) == {
        "model": "claude",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": [text("hi")]}],
    }


def test_a_translated_body_has_the_types_of_the_api() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = translated(
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, image]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call:1.a", "content": "rain"},
        tools=[TOOL],
        tool_choice="required",
        temperature=0.5,
        stop=["x"],
    )
    TypeAdapter(MessageCreateParamsNonStreaming).validate_python(body)
    with pytest.raises(ValidationError):
        TypeAdapter(MessageCreateParamsNonStreaming).validate_python({**body, "system": 3})


def test_the_limit_that_the_api_demands_has_a_default() -> None:
    assert translated(USER)["max_tokens"] == DEFAULT_MAX_TOKENS
    assert translated(USER, max_tokens=5, max_completion_tokens=7)["max_tokens"] == 7
    assert refused(max_tokens=0).failure.kind is FailureKind.UNSUPPORTED
    assert refused(max_tokens="9").failure.kind is FailureKind.INVALID_REQUEST


def test_system_and_developer_turns_become_the_system() -> None:
    body = translated(
        {"role": "system", "content": "a"},
        USER,
        {"role": "developer", "content": [{"type": "text", "text": "b"}]},
    )
    assert body["system"] == [text("a"), text("b")]
    assert len(body["messages"]) == 1


def test_a_tool_call_and_its_results_there() -> None:
    second = {**CALL, "id": "call_2", "function": {"name": "now", "arguments": ""}}
    turns = translated(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, second]},
        {"role": "tool", "tool_call_id": "call:1.a", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": ""},
        {"role": "user", "content": "and tomorrow?"},
        tools=[TOOL],
    )["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"] == [
        {"type": "tool_use", "id": "call_1_a", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "call_2", "name": "now", "input": {}},
    ]
    assert turns[2]["content"] == [
        {"type": "tool_result", "tool_use_id": "call_1_a", "content": [text("rain")]},
        {"type": "tool_result", "tool_use_id": "call_2"},
        text("and tomorrow?"),
    ]


def test_images_by_data_and_by_url() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "https://x/a.png", "detail": "low"}},
    ]
    blocks = translated({"role": "user", "content": parts})["messages"][0]["content"]
    assert [b["source"] for b in blocks] == [
        {"type": "base64", "media_type": "image/png", "data": "AAAA"},
        {"type": "url", "url": "https://x/a.png"},
    ]


def test_empty_texts_which_the_api_refuses_are_left_out() -> None:
    parts = [{"type": "text", "text": ""}, {"type": "text", "text": "a"}]
    turns = translated(
        {"role": "user", "content": parts}, {"role": "assistant", "content": ""}, USER
    )["messages"]
    assert turns == [{"role": "user", "content": [text("a"), text("hi")]}]
    error = refused({"role": "user", "content": ""})
    assert (error.failure.kind, error.param) == (FailureKind.INVALID_REQUEST, "messages")


def test_an_answer_to_be_continued_ends_without_blanks() -> None:
    turns = translated(USER, {"role": "assistant", "content": "The answer is \n"})["messages"]
    assert turns[-1]["content"] == [text("The answer is")]


@pytest.mark.parametrize(
    ("choice", "parallel", "expected"),
    [
        (None, None, None),
        ("auto", True, None),
        ("none", False, {"type": "none"}),
        ("required", None, {"type": "any"}),
        ("auto", False, {"type": "auto", "disable_parallel_tool_use": True}),
        (
            {"type": "function", "function": {"name": "weather"}},
            None,
            {"type": "tool", "name": "weather"},
        ),
    ],
)
def test_tools_and_their_choice(choice: Any, parallel: Any, expected: Any) -> None:
    body = translated(USER, tools=[TOOL], tool_choice=choice, parallel_tool_calls=parallel)
    assert body["tools"] == [
        {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
    ]
    assert body.get("tool_choice") == expected


def test_no_tools_no_choice() -> None:
    assert not {"tools", "tool_choice"} & set(translated(USER, tools=[], tool_choice="auto"))


def test_sampling_fits_the_api() -> None:
    body = {"model": "m", "messages": [USER], "temperature": 1.7, "top_p": 0.9, "top_k": 5}
    sent, dropped = messages_body({**body, "seed": 3, "stop": "x", "user": "u"}, "cloud")
    assert (sent["temperature"], sent["top_k"], sent["stop_sequences"]) == (1.0, 5, ["x"])
    assert set(dropped) == {"top_p", "seed", "user"}
    assert translated(USER, top_p=0.9)["top_p"] == 0.9


def test_a_json_schema_is_asked_for() -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    assert translated(USER, response_format=shape)["output_config"] == {
        "format": {"type": "json_schema", "schema": {"type": "object"}}
    }
    assert "output_config" not in translated(USER, response_format={"type": "text"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_what_the_api_lacks_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields) if "messages" not in fields else refused(*fields["messages"])
    assert (error.failure.kind, error.param) == (FailureKind.UNSUPPORTED, param)


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', 3])
def test_arguments_that_are_no_object_are_the_clients_mistake(arguments: Any) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    error = refused(USER, {"role": "assistant", "tool_calls": [call]})
    assert error.failure.kind is FailureKind.INVALID_REQUEST
    assert error.param == "messages[1].tool_calls[0].function.arguments"


# ---- answers

BLOCKS = [
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "text", "text": "It is "},
    {"type": "text", "text": "wet."},
    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
]
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": BLOCKS,
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 9, "cache_read_input_tokens": 2, "output_tokens": 7},
}


def test_a_whole_answer_becomes_a_chat_completion() -> None:
    Message.model_validate(MESSAGE, strict=True)
    answer = chat_answer(MESSAGE, 5)
    parsed = ChatCompletion.model_validate(answer, strict=True)
    (choice,) = parsed.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "It is wet.")
    call, *others = choice.message.tool_calls or []
    assert not others
    assert (call.id, call.function.name) == ("toolu_1", "weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert answer["choices"][0]["message"]["reasoning"] == "hm"
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (11, 7)
    assert parsed.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("something_new", "stop"),
    ],
)
def test_finish_reasons(stop: str, finish: str) -> None:
    answer = chat_answer({**MESSAGE, "content": [], "stop_reason": stop}, 5)
    assert answer["choices"][0]["finish_reason"] == finish
    assert answer["choices"][0]["message"]["content"] == ""
    assert chunks(messages_stream(stop=stop))[-1]["choices"][0]["finish_reason"] == finish


def chunks(events: list[Event], *, include_usage: bool = False) -> list[dict[str, Any]]:
    """Translate a stream; its last event must be the only [DONE]."""
    translator = ChatStream(5, include_usage=include_usage)
    raw = b"".join(translator.translate(e) for e in events) + translator.end()
    found = [e.data for e in EventScanner().feed(raw) if e.data is not None]
    assert found.count(b"[DONE]") == 1
    assert found[-1] == b"[DONE]"
    return [json.loads(data) for data in found[:-1]]


def block(start: dict[str, Any], *deltas: dict[str, Any]) -> dict[str, Any]:
    return {"start": start, "deltas": list(deltas)}


STREAM = messages_stream(
    block(
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "hm"},
        {"type": "signature_delta", "signature": "s"},
    ),
    block(
        {"type": "text", "text": ""},
        {"type": "text_delta", "text": "It is "},
        {"type": "text_delta", "text": "wet."},
    ),
    block(
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
        {"type": "input_json_delta", "partial_json": ""},
        {"type": "input_json_delta", "partial_json": '{"city":'},
        {"type": "input_json_delta", "partial_json": ' "Oslo"}'},
    ),
    block({"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}}),
    stop="tool_use",
)


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the deltas together as a client does."""
    content, reasoning, calls = "", "", dict[int, dict[str, str]]()
    for one in found:
        for choice in ChatCompletionChunk.model_validate(one, strict=True).choices:
            content += choice.delta.content or ""
            reasoning += (choice.delta.model_extra or {}).get("reasoning") or ""
            for call in choice.delta.tool_calls or ():
                known = calls.setdefault(call.index, {"id": call.id, "arguments": ""})
                known["name"] = known.get("name") or call.function.name
                known["arguments"] += call.function.arguments or ""
    return {"content": content, "reasoning": reasoning, "calls": calls}


def test_a_stream_becomes_chat_chunks() -> None:
    found = chunks(STREAM)
    assert joined(found) == {
        "content": "It is wet.",
        "reasoning": "hm",
        "calls": {
            0: {"id": "toolu_1", "name": "weather", "arguments": '{"city": "Oslo"}'},
            1: {"id": "toolu_2", "name": "now", "arguments": "{}"},
        },
    }
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {one["id"] for one in found} == {"msg_1"}
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert all("usage" not in one for one in found)


def test_usage_is_an_event_of_its_own_if_it_was_asked_for() -> None:
    last = chunks(STREAM, include_usage=True)[-1]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 7)
    assert last["usage"]["prompt_tokens"] == 11


def test_a_stream_that_lacks_its_last_event_is_ended() -> None:
    assert chunks(STREAM[:-1]) == chunks(STREAM)


def test_a_ping_is_a_comment_and_an_error_is_left_to_the_router() -> None:
    translator = ChatStream(5, include_usage=False)
    assert translator.translate(event({"type": "ping"}, "ping")) == b": ping\n\n"
    assert translator.translate(Event(b": x\n\n", None)) == b": ping\n\n"
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}
    assert translator.translate(event(error, "error")) == b""


@given(st.text(max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_text_arrives_as_it_was_sent_however_it_is_cut(whole: str, places: list[int]) -> None:
    bounds = [0, *sorted(p % (len(whole) + 1) for p in places), len(whole)]
    deltas = [{"type": "text_delta", "text": whole[a:b]} for a, b in pairwise(bounds)]
    events = messages_stream(block({"type": "text", "text": ""}, *deltas))
    assert joined(chunks(events))["content"] == whole
    reader = StreamReader(Api.MESSAGES, Origin("c", local=False), empty_is_fine=False)
    for one in events:
        reader.read(one)
    assert reader.committed is bool(whole)


PARTS = st.sampled_from(
    ["message", "index", "content_block", "delta", "usage", "text", "partial_json", "type"]
)
JSON = st.recursive(
    st.none() | st.integers(0, 2) | st.text(max_size=2) | st.just("tool_use"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(PARTS, inner, max_size=4),
    max_leaves=6,
)
TYPES = st.sampled_from(sorted({json.loads(e.data)["type"] for e in STREAM} | {"error", "x"}))


@given(st.lists(st.tuples(TYPES, st.dictionaries(PARTS, JSON, max_size=4)), max_size=6))
def test_no_stream_breaks_the_translation(found: list[tuple[str, dict[str, Any]]]) -> None:
    chunks([event({**fields, "type": kind}, kind) for kind, fields in found])


@given(st.dictionaries(st.sampled_from(["id", "content", "usage", "stop_reason", "model"]), JSON))
def test_no_document_breaks_the_translation(document: dict[str, Any]) -> None:
    assert chat_answer(document, 5)["object"] == "chat.completion"
