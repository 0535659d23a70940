"""Kinds of events: what each upstream's events say, and that the fast way and the parser agree."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calm_serve.upstreams.events import Event
from calm_serve.upstreams.fields import names
from calm_serve.upstreams.kinds import Api, EventKind, classify, classify_parsed, parse_object
from calm_serve.upstreams.usage import usage_of
from tests.unit.upstreams.streams import USAGE, chunk, completion, delta, event

CHAT, COMPLETIONS, RESPONSES, MESSAGES = Api
TOOL_CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f"}}
LOGPROBS = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]}


def kind(document: Any, api: Api = CHAT, name: str = "") -> EventKind:
    return classify(event(document, name), api)[0]


def block(kind_: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": kind_, **fields}}


@pytest.mark.parametrize(
    "found",
    [
        chunk("text"),
        chunk(" "),
        chunk("last words", "stop"),
        delta(role="assistant", content="text"),
        delta(reasoning="hm"),
        delta(reasoning_content="hm"),
        delta(**{"refusal": "no"}),
        delta(tool_calls=[TOOL_CALL]),
        delta(function_call={"name": "f", "arguments": ""}),
        delta(content="", audio={"data": "AA=="}),
        chunk(choices=[{"index": 0, "delta": {"content": ""}, "logprobs": LOGPROBS}]),
        chunk(choices=[{"index": 0, "delta": {}, "token_ids": [1]}]),
        chunk(choices=[{"index": 0, "delta": {}}, {"index": 1, "delta": {"content": "b"}}]),
    ],
)
def test_any_part_of_an_answer_is_content(found: dict[str, Any]) -> None:
    assert kind(found) is EventKind.CONTENT


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (delta(role="assistant"), "empty"),
        (delta(role="assistant", content=""), "empty"),
        (delta(role="assistant", content=None, tool_calls=[], audio=None), "empty"),
        (chunk(choices=[], prompt_filter_results=[{"prompt_index": 0}]), "empty"),
        (chunk(None, "stop"), "finish"),
        (chunk("", "length"), "finish"),
        (chunk(None, "stop", usage=USAGE), "finish"),
        (chunk(choices=[], usage=USAGE), "usage"),
        ({"usage": USAGE}, "usage"),
        (chunk(choices=[], usage=None), "empty"),
        ({"error": {"message": "m", "code": 502}}, "error"),
        ({"error": "text"}, "error"),
        ({"object": "error", "message": "m", "code": 400}, "error"),
        (chunk("", "error", error={"code": 502, "message": "m"}), "error"),
        (chunk("half", error={"code": 502, "message": "m"}), "error"),
        (chunk("half", "error"), "error"),
        (chunk("text", error=None), "content"),
        (b"[DONE]", "end"),
        (b" [DONE] ", "end"),
        (b"", "keepalive"),
        (b"<html>", "error"),
        (b'{"choices": [', "error"),
        (b"[1]", "error"),
    ],
)
def test_events_of_chat(found: Any, expected: str) -> None:
    assert kind(found) == expected


@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize("found", [chunk("text"), block("text_delta", text="t"), b"{}", b""])
def test_an_event_that_is_named_error_is_one_whatever_it_holds(api: Api, found: Any) -> None:
    assert kind(found, api, "error") is EventKind.ERROR


@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize("name", ["ping", "keepalive", "heartbeat"])
def test_an_event_that_is_named_as_a_keepalive_is_one(api: Api, name: str) -> None:
    assert kind(chunk("x"), api, name) is EventKind.KEEPALIVE
    assert classify(Event(b": PROCESSING\n\n", None), api)[0] is EventKind.KEEPALIVE


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (completion("text"), "content"),
        (completion(""), "empty"),
        (completion("", "stop"), "finish"),
        (completion("x", "stop"), "content"),
        (completion(usage=USAGE, choices=[]), "usage"),
    ],
)
def test_events_of_completions(found: Any, expected: str) -> None:
    assert kind(found, COMPLETIONS) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"type": "response.created", "response": {"usage": None}}, "empty"),
        ({"type": "response.output_item.added", "item": {"type": "message"}}, "empty"),
        ({"type": "response.output_text.delta", "delta": "a", "logprobs": []}, "content"),
        ({"type": "response.output_text.delta", "delta": ""}, "empty"),
        ({"type": "response.refusal.delta", "delta": "no"}, "content"),
        ({"type": "response.function_call_arguments.delta", "delta": "{"}, "content"),
        ({"type": "response.reasoning_summary_text.delta", "delta": "hm"}, "content"),
        ({"type": "response.output_item.done", "item": {}}, "content"),
        ({"type": "response.completed", "response": {"usage": {}}}, "end"),
        ({"type": "response.incomplete", "response": {}}, "end"),
        ({"type": "response.failed", "response": {"error": {"message": "m"}}}, "error"),
        ({"type": "error", "code": "server_error", "message": "m"}, "error"),
        ({"type": "keepalive", "sequence_number": 3}, "keepalive"),
        (b"[DONE]", "end"),
    ],
)
def test_events_of_responses(found: Any, expected: str) -> None:
    assert kind(found, RESPONSES, found["type"] if isinstance(found, dict) else "") == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"type": "message_start", "message": {"usage": {"input_tokens": 3}}}, "empty"),
        ({"type": "content_block_start", "content_block": {"type": "text", "text": ""}}, "empty"),
        (
            {
                "type": "content_block_start",
                "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}},
            },
            "content",
        ),
        (block("text_delta", text="a"), "content"),
        (block("text_delta", text=""), "empty"),
        (block("thinking_delta", thinking="hm"), "content"),
        (block("input_json_delta", partial_json='{"a":'), "content"),
        ({"type": "content_block_stop", "index": 0}, "empty"),
        ({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}}, "finish"),
        ({"type": "message_stop"}, "end"),
        ({"type": "ping"}, "keepalive"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, "error"),
    ],
)
def test_events_of_messages(found: dict[str, Any], expected: str) -> None:
    assert kind(found, MESSAGES, found["type"]) == expected


USUAL = {
    CHAT: chunk("text", system_fingerprint="f", usage=None, service_tier=None),
    COMPLETIONS: completion("text"),
    RESPONSES: {"type": "response.output_text.delta", "item_id": "m", "delta": "t", "logprobs": []},
    MESSAGES: block("text_delta", text="t"),
}
COMPACT, SPACED = (",", ":"), (", ", ": ")


def written(document: Any, separators: tuple[str, str], ascii_only: bool = True) -> bytes:
    return json.dumps(document, separators=separators, ensure_ascii=ascii_only).encode()


@pytest.mark.parametrize("separators", [COMPACT, SPACED])
@pytest.mark.parametrize("api", Api)
def test_content_in_its_usual_form_is_known_without_parsing(api: Api, separators: Any) -> None:
    assert classify(event(written(USUAL[api], separators)), api) == (EventKind.CONTENT, None)


def test_vllms_order_of_fields_is_a_usual_form() -> None:
    found = {"delta": "t", "item_id": "m", "logprobs": [], "type": "response.output_text.delta"}
    assert classify(event(written(found, COMPACT)), RESPONSES) == (EventKind.CONTENT, None)


TEXTS = st.text(max_size=8) | st.sampled_from(
    ['"', "\\", '"}}],"error":{"message":"x"}', '{"content":"', "\\u0000", "\ud83d", "é日🫠", ""]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**7) | st.floats(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.sampled_from(
    sorted(
        names("""
        content reasoning reasoning_content tool_calls role refusal text delta message logprobs
        error usage finish_reason stop_reason token_ids type object model id index choices x_groq
        response partial_json thinking item_id obfuscation content_block message_start""")
    )
)
EXTRA = st.dictionaries(FIELDS, VALUES | st.just(USAGE), max_size=3)
TYPES = st.sampled_from(
    sorted(
        names("response.output_text.delta response.failed error content_block_delta text_delta x")
    )
)


@st.composite
def documents(draw: st.DrawFn) -> tuple[Api, bytes]:
    """Any API's content, with fields added and taken away at each depth."""
    api = draw(st.sampled_from(Api))
    found = json.loads(json.dumps(USUAL[api]))
    parts = [found]
    if api in (CHAT, COMPLETIONS):
        parts += found["choices"]
    if api in (CHAT, MESSAGES):
        parts.append(parts[-1]["delta"])
    for part in parts:
        if draw(st.booleans()):
            part.update(draw(EXTRA))
        if draw(st.integers(0, 4)) == 0:
            part.pop(draw(st.sampled_from(sorted(part))), None)
        for field in ("content", "text", "delta"):
            if isinstance(part.get(field), str):
                part[field] = draw(TEXTS)
        if "type" in part and draw(st.integers(0, 4)) == 0:
            part["type"] = draw(TYPES)
    separators = draw(st.sampled_from([COMPACT, SPACED]))
    text = json.dumps(found, separators=separators, ensure_ascii=draw(st.booleans()))
    return api, text.encode("utf-8", "surrogatepass")


def agree(api: Api, data: bytes, name: str = "") -> None:
    fast, document = classify(event(data, name), api)
    slow, parsed = classify_parsed(event(data, name), api)
    assert fast is slow
    if document is None and fast is EventKind.CONTENT:
        assert parsed is not None
        assert usage_of(parsed) is None
        assert not any(c.get("finish_reason") for c in parsed.get("choices", ()))


PLAIN = written(chunk("text"), COMPACT)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (written(chunk("text", error="broken"), COMPACT), "error"),
        (written(chunk("text", error=5), COMPACT), "error"),
        (written(chunk("text", object="error"), COMPACT), "error"),
        (written(chunk("text", type="error"), COMPACT), "error"),
        (written(chunk("text", x={"error": "m"}), COMPACT), "content"),
        (PLAIN.replace(b"text", rb"a\xb"), "error"),  # no escape of JSON
        (PLAIN.replace(b"text", rb"a\u12"), "error"),
        (PLAIN.replace(b"text", b"a\tb"), "error"),  # a control character
        (PLAIN.replace(b'"created":1', b'"created":01'), "error"),
        (PLAIN.replace(b'"text"', b'"text","content":""'), "empty"),  # the last one counts
        (PLAIN[:-1] + b',"choices":[]}', "empty"),
        (PLAIN + PLAIN, "error"),
    ],
)
def test_what_looks_like_content_and_is_not(data: bytes, expected: str) -> None:
    assert classify(event(data), CHAT)[0] == expected
    agree(CHAT, data)


@given(documents(), st.sampled_from(["", "error", "ping", "x"]))
def test_the_fast_way_and_the_parser_agree(found: tuple[Api, bytes], name: str) -> None:
    agree(*found, name)


@given(documents(), st.integers(0, 500), st.binary(max_size=2), st.integers(0, 2))
@example((CHAT, written(chunk("te"), COMPACT)), 0, b"[", 1)
def test_they_agree_on_damaged_events(
    found: tuple[Api, bytes], place: int, put: bytes, taken: int
) -> None:
    api, data = found
    place %= len(data)
    agree(api, data[:place] + put + data[place + taken :])


@pytest.mark.parametrize("api", Api)
def test_no_text_makes_the_fast_way_slow(api: Api) -> None:
    """Backtracking over nested quantifiers would take for ever here."""
    found = USUAL[api] | {"zz": [1]}  # no usual form
    text = "\\" * 900
    data = written(found, COMPACT).replace(b'"te', b'"' + text.encode() + b"te")
    started = time.process_time()
    for _ in range(20):
        classify(event(data), api)
    assert time.process_time() - started < 1.0


def test_a_document_is_read_though_it_is_not_clean() -> None:
    assert parse_object(b'{"a": "\\ud83d"}') == {"a": "\ud83d"}
    assert parse_object(b'{"a": "\xff"}') == {"a": "\ufffd"}
    assert parse_object(b'{"a": NaN}') is not None
    assert parse_object(b"[" * 100_000) is None
    assert parse_object(b'{"a": ' * 100_000) is None
    assert parse_object(b'{"a": ' + b"9" * 10_000 + b"}") is None
