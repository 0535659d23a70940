"""Answers: what is one, what only looks like one, and what a stream was at its end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.upstreams.answers import (
    END_EVENTS,
    Answer,
    StreamReader,
    may_be_empty,
    read_answer,
    wrong_content_type,
)
from calm_serve.upstreams.error_documents import Origin
from calm_serve.upstreams.events import EventScanner
from calm_serve.upstreams.fields import names
from calm_serve.upstreams.kinds import Api, EventKind
from calm_serve.upstreams.usage import Usage
from tests.unit.upstreams.streams import (
    DONE,
    USAGE,
    chunk,
    completion,
    delta,
    document,
    event,
    messages_stream,
    sse,
)

CHAT, COMPLETIONS, RESPONSES, MESSAGES = Api
ORIGIN = Origin("cloud", local=False, context_tokens=4096)
USED = Usage(prompt_tokens=11, output_tokens=4)
TEXT = {"start": {"type": "text", "text": ""}, "deltas": [{"type": "text_delta", "text": "hi"}]}


def read(found: Any, api: Api = CHAT, **options: Any) -> Answer:
    body = found if isinstance(found, bytes) else json.dumps(found).encode()
    return read_answer(body, api, ORIGIN, empty_is_fine=options.get("empty_is_fine", False))


def stream(*parts: Any, api: Api = CHAT, ended: bool = True, **options: Any) -> Answer:
    """Read a stream of documents (or bytes, as they are) to its end."""
    options.setdefault("empty_is_fine", False)
    scanner, reader = EventScanner(), StreamReader(api, ORIGIN, **options)
    for part in [*parts, *([DONE] if ended else [])]:
        for one in scanner.feed(part if isinstance(part, bytes) else sse(part)):
            reader.read(one)
    for one in scanner.finish():
        reader.read(one)
    return reader.finish(truncated=scanner.truncated)


def kind(answer: Answer) -> str:
    return str(answer.failure.kind) if answer.failure else ""


def message(**fields: Any) -> dict[str, Any]:
    """A whole chat answer with this message and, by `finish`, its reason."""
    finish = fields.pop("finish", "stop")
    inner = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], **fields}
    return document(choices=[{"index": 0, "message": inner, "finish_reason": finish}])


def test_a_whole_answer_is_read_in_one_go() -> None:
    assert read(document()) == Answer(None, USED, ("stop",), 1)


@pytest.mark.parametrize(
    "found",
    [
        message(content="text"),
        message(content=" "),
        message(**{"refusal": "I cannot"}),
        message(reasoning="hm"),
        message(tool_calls=[{"id": "c", "function": {"name": "f"}}], finish="tool_calls"),
        message(function_call={"name": "f"}),
        message(content="", finish="length"),  # the limit was reached while it reasoned
        message(content="", finish="content_filter"),
        document(choices=[{"message": {"content": ""}}, {"message": {"content": "b"}}]),
        document(error=None),
    ],
)
def test_answers_of_every_form_are_answers(found: dict[str, Any]) -> None:
    assert read(found).failure is None


@pytest.mark.parametrize(
    "found",
    [
        document(choices=[]),
        message(content=""),
        message(content=None),
        message(content="", finish=None),
        message(content=None, finish="tool_calls"),
        message(content=[]),
        document(choices=[None]),
    ],
)
def test_an_answer_without_content_is_empty(found: dict[str, Any]) -> None:
    assert kind(read(found)) == "empty_answer"
    assert read(found, empty_is_fine=True).failure is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"  ",
        b"<!DOCTYPE html><html>Sign in</html>",
        json.dumps(document()).encode()[:-9],
        b"[1]",
        b'"text"',
        b"{}",
        b'{"message": "ok"}',
        DONE,
    ],
)
def test_what_is_no_answer_is_a_bad_one(body: bytes) -> None:
    assert kind(read(body)) == "bad_answer"


def test_an_error_in_a_200_is_the_failure_that_it_names() -> None:
    assert kind(read({"error": {"message": "m", "code": 502}})) == "server_error"
    assert kind(read({"error": {"message": "m", "code": 429}})) == "rate_limited"
    assert kind(read(document(error={"message": "m"}))) == "bad_answer"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"content": [{"type": "text", "text": "a"}], "stop_reason": "end_turn"}, ""),
        ({"content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}, ""),
        ({"content": [], "stop_reason": "end_turn"}, "empty_answer"),
        ({"content": [{"type": "text", "text": ""}], "stop_reason": "end_turn"}, "empty_answer"),
        ({"content": [], "stop_reason": "max_tokens"}, ""),
        ({"content": [], "stop_reason": "refusal"}, ""),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, "full"),
        ({"type": "message"}, "bad_answer"),
    ],
)
def test_answers_of_messages(found: dict[str, Any], expected: str) -> None:
    assert kind(read(found, MESSAGES)) == expected


OUTPUT = {"type": "message", "content": [{"type": "output_text", "text": "a"}]}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"status": "completed", "output": [OUTPUT]}, ""),
        ({"status": "completed", "output": [{"type": "function_call", "name": "f"}]}, ""),
        ({"status": "completed", "output": []}, "empty_answer"),
        ({"status": "completed", "output": [{"type": "reasoning", "summary": []}]}, "empty_answer"),
        ({"status": "completed", "output": [{"type": "message", "content": []}]}, "empty_answer"),
        (
            {
                "status": "incomplete",
                "output": [],
                "incomplete_details": {"reason": "max_output_tokens"},
            },
            "",
        ),
        ({"status": "queued", "output": []}, ""),
        ({"status": "failed", "error": {"code": "server_error", "message": "m"}}, "server_error"),
        ({"status": "completed"}, "bad_answer"),
    ],
)
def test_answers_of_responses(found: dict[str, Any], expected: str) -> None:
    assert kind(read(found, RESPONSES)) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 0}, True),
        ({"max_completion_tokens": 0}, True),
        ({"echo": True, "max_tokens": 5}, True),
        ({"stop": ["\n"]}, True),
        ({"stop_sequences": ["\n"]}, True),
        ({"stop_token_ids": [2]}, True),
        ({"suffix": "}"}, True),
        ({"max_tokens": 5, "stop": None, "echo": False, "stop_token_ids": []}, False),
        ({}, False),
    ],
)
def test_requests_whose_right_answer_may_be_empty(body: dict[str, Any], expected: bool) -> None:
    assert may_be_empty(body) is expected


@pytest.mark.parametrize(
    ("content_type", "streamed", "accepted"),
    [
        ("application/json", False, True),
        ("application/json; charset=utf-8", False, True),
        ("Application/JSON", False, True),
        ("application/problem+json", False, True),
        ("text/event-stream; charset=utf-8", True, True),
        ("", True, True),
        ("", False, True),
        ("text/plain", True, True),
        ("text/html", False, False),
        ("text/html; charset=utf-8", True, False),
        ("application/json", True, False),
        ("text/event-stream", False, False),
    ],
)
def test_content_types(content_type: str, streamed: bool, accepted: bool) -> None:
    failure = wrong_content_type(content_type, stream=streamed, origin=ORIGIN)
    assert (failure is None) is accepted


def test_a_stream_is_read_to_its_end() -> None:
    answer = stream(
        delta(role="assistant"), chunk("a"), chunk("b"), chunk(None, "stop"), {"usage": USAGE}
    )
    assert answer == Answer(None, USED, ("stop",), 1)


def test_a_stream_is_forwarded_byte_for_byte_but_for_usage_that_was_not_asked_for() -> None:
    head = b": hello\n\n" + sse(delta(role="assistant")) + sse(chunk("na\u00efve"))
    tail = sse(chunk(None, "stop")).replace(b"\n", b"\r\n")
    usage = sse({"choices": [], "usage": USAGE})
    scanner, reader = EventScanner(), StreamReader(CHAT, ORIGIN, empty_is_fine=False)
    forwarded = b""
    for number in head + tail + usage + DONE:
        for one in scanner.feed(bytes([number])):
            if reader.read(one) is not EventKind.USAGE:
                forwarded += one.raw
    assert forwarded == head + tail + DONE
    assert reader.usage == USED


def test_a_stream_commits_with_its_first_content_and_not_before() -> None:
    reader = StreamReader(CHAT, ORIGIN, empty_is_fine=False)
    before = [b": PROCESSING\n\n", sse(delta(role="assistant", content="")), sse({"choices": []})]
    for raw in before:
        for one in EventScanner().feed(raw):
            reader.read(one)
    assert not reader.committed
    assert reader.read(event(chunk("a"))) is EventKind.CONTENT
    assert reader.committed


@pytest.mark.parametrize(
    "parts",
    [
        [chunk("half")],
        [delta(role="assistant")],
        [],
        [b": PROCESSING\n\n"],
        [chunk("half"), b'data: {"id": "x", "cho'],
        [chunk("all", "stop"), b'data: {"id": "x", "cho'],
        [chunk("one of two", "stop"), delta(role="assistant") | {"choices": [{"index": 1}]}],
    ],
)
def test_a_stream_that_just_ends_is_a_failure(parts: list[Any]) -> None:
    assert kind(stream(*parts, ended=False)) == "bad_answer"


def test_all_the_choices_that_were_asked_for_must_end() -> None:
    assert kind(stream(chunk("a", "stop"), ended=False, choices=2)) == "bad_answer"
    second = chunk(choices=[{"index": 1, "delta": {"content": "b"}, "finish_reason": "stop"}])
    both = stream(chunk("a", "stop"), second, ended=False, choices=2)
    assert (both.failure, both.choices, both.lacks_end) == (None, 2, True)


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS])
def test_a_whole_stream_without_its_last_event_lacks_only_that(api: Api) -> None:
    parts = [chunk("a"), chunk(None, "stop")] if api is CHAT else [completion("a", "stop")]
    answer = stream(*parts, api=api, ended=False)
    assert (answer.failure, answer.lacks_end) == (None, True)
    assert END_EVENTS[api] == DONE
    assert stream(*parts, api=api).lacks_end is False


def test_a_last_event_without_its_blank_line_is_an_end() -> None:
    assert stream(chunk("a"), DONE[:-2], ended=False).failure is None


def test_an_error_in_a_stream_is_its_failure_though_it_ends_well() -> None:
    assert kind(stream(chunk("half"), {"error": {"message": "m", "code": 502}})) == "server_error"
    cut = stream(chunk("half"), chunk("", "error", error={"code": 502}), ended=False)
    assert kind(cut) == "server_error"
    assert kind(stream(chunk("half"), b"data: <html>\n\n")) == "bad_answer"


def test_what_follows_the_end_says_nothing() -> None:
    assert stream(chunk("a"), DONE, {"error": {"message": "m"}}).failure is None


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([delta(role="assistant"), chunk("", "stop")], "empty_answer"),
        ([chunk("", "length")], ""),
        ([chunk("", "content_filter")], ""),
        ([{"choices": [], "usage": USAGE}], "empty_answer"),
    ],
)
def test_a_stream_without_content_is_empty(parts: list[Any], expected: str) -> None:
    assert kind(stream(*parts)) == expected
    assert stream(*parts, empty_is_fine=True).failure is None


@pytest.mark.parametrize(
    "parts",
    [
        [chunk("a", usage=USAGE), chunk(None, "stop", usage=None), {"choices": [], "usage": None}],
        [chunk("a"), chunk(None, "stop", usage=USAGE)],
        [chunk("a", usage={**USAGE, "completion_tokens": 1}), chunk(None, "stop", usage=USAGE)],
        [chunk("a"), chunk(choices=[{"index": 0, "finish_reason": "stop", "usage": USAGE}])],
        [chunk("a", "stop"), {"choices": [], "x_groq": {"usage": USAGE}}],
    ],
)
def test_usage_is_kept_wherever_it_came(parts: list[Any]) -> None:
    assert stream(*parts).usage == USED


def test_a_stream_without_usage_says_that_it_is_not_known() -> None:
    assert stream(chunk("a", "stop")).usage is None


def test_a_stream_of_messages_is_read() -> None:
    parts = [e.raw for e in messages_stream(TEXT)]
    answer = stream(*parts, api=MESSAGES, ended=False)
    assert answer == Answer(None, Usage(11, 2, 7), ("end_turn",), 1)
    assert stream(*parts[:-1], api=MESSAGES, ended=False).lacks_end
    assert kind(stream(*parts[:-2], api=MESSAGES, ended=False)) == "bad_answer"


def test_a_stream_of_responses_is_read() -> None:
    usage = {"input_tokens": 11, "output_tokens": 4}
    end = {"status": "completed", "output": [OUTPUT], "usage": usage}
    parts = [
        {"type": "response.created", "response": {"usage": None}},
        {"type": "response.output_text.delta", "delta": "a"},
        {"type": "response.completed", "response": end},
    ]
    answer = stream(*parts, api=RESPONSES, ended=False)
    assert (answer.failure, answer.usage, answer.lacks_end) == (None, USED, False)
    assert kind(stream(*parts[:-1], api=RESPONSES, ended=False)) == "bad_answer"
    failed = {"type": "response.failed", "response": {"error": {"code": "server_error"}}}
    assert kind(stream(parts[0], failed, api=RESPONSES, ended=False)) == "server_error"


PARTS = st.sampled_from(
    [
        sse(chunk("a")),
        sse(chunk("", "stop")),
        sse(chunk("b", "length", usage=USAGE)),
        sse({"choices": [{"index": 10**9, "finish_reason": ["x"]}, None, 3], "usage": [1]}),
        sse({"choices": [{"index": 3, "delta": None}]}),
        sse({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}),
        sse({"type": "message_delta", "delta": None}),
        sse({"type": "content_block_start", "content_block": 3}),
        sse({"type": "response.completed", "response": 3}),
        sse({"type": "response.completed", "response": {"output": [None], "status": 4}}),
        sse({"error": {"code": [1]}}),
        sse(b"[]"),
        sse(b"{"),
        DONE,
        b": x\n\n",
        b"event: error\n\n",
    ]
)


@given(st.lists(PARTS, max_size=8), st.sampled_from(Api), st.booleans())
def test_every_stream_ends_in_an_answer(parts: list[bytes], api: Api, whole: bool) -> None:
    answer = stream(*parts, api=api, ended=whole)
    assert answer.failure is None or not answer.lacks_end


NAMES = st.sampled_from(
    sorted(names("choices message content output error usage status text type finish_reason"))
)
DOCUMENTS = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=9,
)


@given(DOCUMENTS, st.sampled_from(Api))
def test_every_document_is_an_answer_or_a_failure(found: Any, api: Api) -> None:
    answer = read(found, api)
    assert answer.failure is None or answer.failure.message
