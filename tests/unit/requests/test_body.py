"""Bytes of a body: what is JSON, what is refused, and that the structure is bounded first."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.errors import RequestError
from calm_serve.requests import body as body_module
from calm_serve.requests.body import MAX_NODES, MAX_VALUES, parse_body

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # JSON in UTF-8 has no lone surrogates
FINITE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(FINITE)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_body(json.dumps(value).encode()) == value


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
def test_numbers_that_are_not_finite_are_refused_by_their_field(number: str) -> None:
    with pytest.raises(RequestError, match="temperature") as caught:
        parse_body(f'{{"model": "auto", "temperature": {number}}}'.encode())
    assert (caught.value.param, caught.value.http_status) == ("temperature", 400)


def test_a_nested_nan_is_refused_by_its_path() -> None:
    with pytest.raises(RequestError, match="NaN or Infinity") as caught:
        parse_body(b'{"logit_bias": {"5": 1.0}, "stop": [{"a": [0, NaN]}]}')
    assert caught.value.param == "stop[0].a[1]"


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"a" 1}', b"\xff", b'{"a": "\xff"}', b'{"a": "\\ud83d x"}', b"[" * 300]
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError, match="not valid JSON") as caught:
        parse_body(raw)
    assert caught.value.param is None


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_body(b'\xef\xbb\xbf{"model": "auto"}') == {"model": "auto"}


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages":[' + b",".join([b'{"role":"user","content":""}'] * 130_000) + b"]}",
        b"[" + b",".join([b"[]"] * 100_000) + b"]",
        b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}",
        b"[" + b",".join([b"1"] * (MAX_VALUES + 2)) + b"]",
        b'["\\\\",' * 60_000,  # a text that ends in a backslash hides nothing
    ],
    ids=["messages", "lists", "keys", "numbers", "backslashes"],
)
def test_too_much_structure_is_refused_before_it_is_parsed(
    raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "from_json", None)  # calling it would raise a TypeError
    with pytest.raises(RequestError, match="more than"):
        parse_body(raw)


def test_signs_inside_of_a_text_are_no_structure() -> None:
    text = '{"a": [1, 2], \\"b\\": "c\\\\"}, ' * (MAX_NODES // 2)
    assert parse_body(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_a_long_conversation_and_many_token_ids_are_within_the_bounds() -> None:
    part = {"type": "text", "text": "hello, {world}: [1, 2]"}
    long = {"messages": [{"role": "user", "content": [part]}] * 5000}
    assert parse_body(json.dumps(long).encode()) == long
    ids = {"input": [[7] * 1000] * 300}
    assert parse_body(json.dumps(ids).encode()) == ids
