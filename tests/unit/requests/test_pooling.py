"""Embeddings, ranking, scores and tokens: what is compared, and how long each sequence is."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.errors import RequestError
from calm_serve.requests.parsed import MAX_PROMPTS
from calm_serve.requests.pooling import (
    parse_detokenize,
    parse_embeddings,
    parse_rerank,
    parse_score,
    parse_tokenize,
)
from calm_serve.types import Task

USER = {"role": "user", "content": "hello"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}


@pytest.mark.parametrize(
    ("value", "text", "count", "longest"),
    [
        ("hello", "hello", 1, None),
        (["a", "bcd"], "a\nbcd", 2, 3),
        ("", "", 1, None),
        ([""], "", 1, 0),
        ([5, 6, 7], "", 1, None),
        ([[5, 6], [7]], "", 2, None),
        ([USER], "\x02user\x03hello", 1, None),
        ([[USER], [USER, USER]], "\x02user\x03hello" * 3, 2, 22),
    ],
)
def test_every_form_of_input_is_read(
    value: Any, text: str, count: int, longest: int | None
) -> None:
    parsed = parse_embeddings({"input": value})
    assert parsed.task is Task.EMBED
    assert (parsed.text, parsed.choices, parsed.sequence_chars) == (text, count, longest)
    assert parsed.needs == (("chat",) if "user" in text else ())


def test_messages_may_have_a_field_of_their_own() -> None:
    parsed = parse_embeddings({"messages": [USER, IMAGE]})
    assert parsed.needs == ("chat", "vision")
    assert parse_embeddings({"messages": [[USER], [USER]]}).choices == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a"] * (MAX_PROMPTS + 1)}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [USER, 5]}, "input[1]"),
        ({"input": [[USER], []]}, "input[1]"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
    ],
)
def test_other_input_is_refused_with_the_parameter_named(body: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_embeddings(body)
    assert caught.value.param == param


def test_a_query_precedes_its_documents_and_each_pair_is_a_sequence() -> None:
    parsed = parse_rerank({"query": "what", "documents": ["a", "bcd"], "top_n": 1})
    assert (parsed.text, parsed.choices, parsed.sequence_chars) == ("what\na\nbcd", 2, 7)
    assert (parsed.task, parsed.needs) == (Task.RERANK, ())


@pytest.mark.parametrize(
    "documents", ["a", {"content": [{"type": "text", "text": "a"}]}, [{"text": "a"}]]
)
def test_documents_may_be_texts_or_objects(documents: Any) -> None:
    assert parse_rerank({"query": "q", "documents": documents}).text == "q\na"


@pytest.mark.parametrize(
    "names",
    [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")],
)
def test_scores_are_asked_for_under_any_of_vllms_names(names: tuple[str, str]) -> None:
    parsed = parse_score({names[0]: ["q", "long query"], names[1]: "d"})
    assert (parsed.text, parsed.choices, parsed.sequence_chars) == ("q\nlong query\nd", 2, 11)


def test_an_image_in_a_document_needs_vision() -> None:
    image = {"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    assert parse_rerank({"query": "q", "documents": [image]}).needs == ("vision",)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "query"),
        ({"query": "q"}, "documents"),
        ({"documents": ["d"]}, "query"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": 5, "documents": ["d"]}, "query"),
        ({"query": "q", "documents": ["d"] * (MAX_PROMPTS + 1)}, "documents"),
        ({"query": "q", "documents": [5]}, "documents"),
    ],
)
def test_a_wrong_comparison_is_refused_with_the_parameter_named(body: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_rerank(body)
    assert caught.value.param == param


def test_only_a_tokenizer_is_asked_for_tokens() -> None:
    for parsed in (parse_tokenize({"prompt": "hello"}), parse_detokenize({"tokens": [1, 2]})):
        assert (parsed.task, parsed.tokenizer_only) == (Task.ANY, True)
    assert parse_tokenize({"messages": [USER]}).needs == ("chat",)
    assert parse_detokenize({"tokens": [1, 2]}).is_token_ids
    with pytest.raises(RequestError, match="tokens"):
        parse_detokenize({"tokens": "hello"})
