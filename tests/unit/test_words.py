"""Two ways to read words, one for ASCII and one for any text, that must not differ."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calm_serve.analyze.words import _read_any, _read_ascii, language_words, read_words

PIECES = (
    *"aZ9_.,!?'\"/~{[<=+*|\n\t\x00\x08\x1c\x1f\x7f ",
    *("don't", "o'clock'n'roll", "more", "each's", "'less'", "remain", "remains", "remain_1"),
    *("how many", "How  many", "how much", "3more", "1,000.5", "1.2.3", "...", "a.b"),
)
TEXTS = st.text(st.characters(max_codepoint=127)) | st.lists(st.sampled_from(PIECES)).map("".join)


@given(TEXTS)
@example("x " * 60 + "'a'b'c'")
@example("_ " * 70 + "word " * 80)
@example("EACH each eAch " * 3)
def test_bytes_and_characters_are_read_alike(text: str) -> None:
    one, other = _read_ascii(text), _read_any(text)
    assert one._replace(signs="") == other._replace(signs="")
    for sign in "?\"'/~{[<=+*|\n":
        assert one.signs.count(sign) == other.signs.count(sign)


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    words = read_words(text)
    assert 0 <= words.distinct <= words.tokens
    assert words.words <= words.tokens
    assert len(words.ends) <= words.tokens


@pytest.mark.parametrize("beyond", ["", "é"])
def test_what_is_counted(beyond: str) -> None:
    words = read_words("How many of Tom's 1,200 apples remain? Two." + beyond)
    assert words.words == 7
    assert words.numerals == [5]
    assert words.quantities == 2
    assert words.ends[3:7] == [b"tom's", b"0", b",", b"0"]
    assert words.upper == 3


def test_runs_of_letters_tell_the_language() -> None:
    assert language_words("It's 2 o'clock_now") == ["it", "s", "o", "clock", "now"]
    assert language_words("Größe_2x") == ["größe", "x"]
