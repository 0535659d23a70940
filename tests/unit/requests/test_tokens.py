"""What a text is made of, and hashes that tell tokens apart."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calm_serve.requests.tokens import (
    CHARACTERS,
    HEAD_TOKENS,
    MAX_BYTES,
    TAIL_TOKENS,
    pair_hashes,
    read_tokens,
    token_hashes,
)

TOKEN = re.compile(r"[a-z]+|[0-9]+|[^a-z0-9_\s\x00-\x1f\x7f]")


@given(st.text(st.characters(max_codepoint=127)))
@example("x " * 60 + "'a'b'c'")
@example("_ " * 70 + "word " * 80)
@example("1,000.5 THEN 12345")
def test_ascii_tokens_are_runs_of_letters_or_digits_and_single_signs(text: str) -> None:
    tokens = TOKEN.findall(text.lower())
    words = read_tokens(text)
    assert words.tokens == len(tokens)
    assert words.words == sum(t.isalpha() for t in tokens)
    assert words.numerals == sum(t.isdigit() for t in tokens)
    assert words.large_numerals == sum(t.isdigit() and len(t) > 3 for t in tokens)
    named = ["0" if t.isdigit() else t for t in tokens]
    if len(named) > HEAD_TOKENS + TAIL_TOKENS:
        named = [*named[:HEAD_TOKENS], *named[-TAIL_TOKENS:]]
    assert len(words.hashes) == len(named)
    assert len(words.vocabulary) == len(set(named))
    same = dict(zip(named, words.hashes.tolist(), strict=True))
    assert [same[t] for t in named] == words.hashes.tolist()


@given(st.text())
@example("\ud800")
@example("ß" * MAX_BYTES)
@example("İ" * MAX_BYTES)  # its lower case has more bytes
def test_any_text_can_be_read(text: str) -> None:
    words = read_tokens(text)
    assert words.words + words.numerals <= words.tokens
    assert len(words.vocabulary) <= len(words.hashes) <= words.tokens
    assert words.non_ascii <= words.bytes <= MAX_BYTES


@pytest.mark.parametrize("beyond", ["", "é"])
def test_what_is_counted(beyond: str) -> None:
    words = read_tokens("How many of Tom's 1200 apples remain? Two." + beyond)
    named = dict(zip(CHARACTERS, words.characters, strict=True))
    assert words.words == 8 + bool(beyond)
    assert (words.numerals, words.large_numerals) == (1, 1)
    assert (named["upper"], named["digit"], named["question_mark"], named["quote"]) == (3, 4, 1, 1)
    assert words.sentences == (1 if beyond else 2)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("größe élan", 2), ("日本語", 3), ("Привет, мир", 3), ("“no”", 3), ("¿qué?", 3), ("a—b", 3)],
)
def test_scripts_without_blanks_have_a_token_per_character(text: str, tokens: int) -> None:
    assert read_tokens(text).tokens == tokens


def test_case_does_not_change_a_word() -> None:
    assert token_hashes("GRÖSSE Kind") == token_hashes("grösse kind")


@given(st.lists(st.text("abcde", min_size=1, max_size=6), min_size=2, max_size=60, unique=True))
def test_different_words_have_different_hashes_wherever_they_stand(words: list[str]) -> None:
    assert len(token_hashes(" ".join(words))) == len(words)
    assert token_hashes(" ".join(words)) == token_hashes("  ".join(reversed(words)))


def test_a_pair_depends_on_the_order_of_its_words() -> None:
    dog, man = (pair_hashes(read_tokens(t).hashes) for t in ("dog bites man", "man bites dog"))
    assert set(dog.tolist()).isdisjoint(man.tolist())
    assert len(pair_hashes(read_tokens("one").hashes)) == 0
