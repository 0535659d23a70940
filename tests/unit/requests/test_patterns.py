"""Rust's engine may answer only where it must say what `re` says."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calm_serve.requests.patterns import (
    _SAME_CHARACTERS,
    Pattern,
    Patterns,
    _rust,
    plain,
)

SAME = (
    r"\b(password|passwd|api[_ -]?key|private key)\b",
    r"\bselect\b.+\bfrom\b",
    r"^\W*(hi|hello)\b|\bstory\b",
    r"[\w.+-]+@[\w-]+\.\w+",
    r"\b\d{3}-\d{2}-\d{4}\b",
    r"^\s*key\s+[^\s]{2,}$",
    r"\S\s\S",
    r"a\\s",
    r"k\B.?s",
    r"[^a-z\s]{3}",
    "```",
    "",
)
OTHERS = (
    r"(?=a)b",
    r"(?<!a)b",
    r"(a)\1",
    "a*+b",
    "a{2}+",
    "(?>a)",
    "(?i)a",
    "x{",
    "{a}",
    "[[]",
    "[]a]",
    r"\<a",
    r"a\Z",
    r"a\Ab",
    "größe",
    r"\é",
)
PIECES = (
    *("password", "API key", "select a from b", "hi", "Hello ", "a@b.co", "123-45-6789", "key  ab"),
    *("\u017f", "\u212a", "\u0130", "\u0131", "\u00b2", "\u0301", "\u200d", "\u203f", "\u24d0"),
    *(
        "é",
        "ß",
        "“",
        "😀",
        "\ud800",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u2028",
        "\n",
        "\\s",
        " ",
        "_",
    ),
)
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@pytest.mark.parametrize("pattern", SAME)
@given(TEXTS)
@example("a\x1cb")
@example("pa\u017fsword")
@example("x\u0301password\u00b2")
@example("\ud800 password")
def test_a_pattern_occurs_exactly_where_re_finds_it(pattern: str, text: str) -> None:
    found = re.search(pattern, text, re.IGNORECASE | re.MULTILINE) is not None
    assert Pattern(pattern).occurs(text, plain(text)) is found
    exact = re.search(pattern, text, re.MULTILINE) is not None
    assert Pattern(pattern, ignore_case=False).occurs(text, plain(text)) is exact


@pytest.mark.parametrize("pattern", SAME)
def test_plain_patterns_are_fast(pattern: str) -> None:
    assert Pattern(pattern).fast


@pytest.mark.parametrize("pattern", OTHERS)
def test_what_the_engines_read_differently_stays_with_re(pattern: str) -> None:
    assert not Pattern(pattern).fast


def test_a_pattern_too_large_for_rust_stays_with_re() -> None:
    large = Pattern(r"(\w{100}){100}x")
    assert not large.fast
    assert not large.occurs("a", True)


def test_both_engines_see_the_same_in_every_plain_character() -> None:
    plain_characters = re.compile(f"[{_SAME_CHARACTERS}]")
    classes = ((r"\w", r"\w"), (r"\d", r"\d"), (r"\s", r"[\s\x1c-\x1f]"), (r"(?i)[ -~]", None))
    pairs = [(re.compile(p).match, _rust(r or p)) for p, r in classes]
    characters = [c for c in map(chr, range(0x20000)) if plain_characters.match(c)]
    assert len(characters) > 30_000
    for character in characters:
        for ours, rusts in pairs:
            assert bool(ours(character)) == rusts(character), hex(ord(character))
        assert character.isascii() or not pairs[-1][0](character), hex(ord(character))


@pytest.mark.parametrize("text", ["\u0301", "\u017f", "\u00b2", "\ud800", "a\u200d"])
def test_other_characters_are_not_plain(text: str) -> None:
    assert not plain(text)


@given(TEXTS)
def test_several_patterns_are_found_by_name(text: str) -> None:
    patterns = {str(i): p for i, p in enumerate(SAME[:-1])}
    for chosen in (patterns, {**patterns, "other": "größe"}, {}):
        expected = [n for n, p in chosen.items() if Pattern(p).occurs(text, plain(text))]
        assert Patterns(chosen).found(text, plain(text)) == expected
