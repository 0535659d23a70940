"""Words, numerals and signs of a text of bounded length: counts, and the words at its ends.

ASCII, which is most text, is read as bytes, where every step is one call for the whole text; other
text goes through regular expressions over characters. For ASCII text both give the same.
"""

from __future__ import annotations

import re
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits
from typing import NamedTuple, TypeVar

HEAD_WORDS, TAIL_WORDS = 48, 16
T = TypeVar("T")


class Words(NamedTuple):
    """What a text is made of. A token is a word, a run of digits, or one sign."""

    ends: list[bytes]  # first and last tokens in lower case, UTF-8; a run of digits is b"0"
    tokens: int
    distinct: int  # different tokens; all runs of digits are one
    words: int
    word_chars: int
    numerals: list[int]  # characters of each, separators included
    upper: int  # upper-case characters
    sentences: int
    quantities: int
    non_ascii: int
    signs: str  # the text, maybe without letters, digits and blanks


_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[^\w\s]")
_NUMERAL = re.compile(r"\d\d*(?:[.,]\d+)*")
_LANGUAGE_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_QUANTITY_WORDS = "each every per times twice half double more less fewer total left altogether"
_QUANTITIES = re.compile(
    rf"\b(?:{'|'.join(_QUANTITY_WORDS.split())}|remain\w*|how many|how much)\b", re.IGNORECASE
)

# The same for ASCII in bytes. `re` counts four control characters as white space.
_SPACE = "\t\n\v\f\r\x1c\x1d\x1e\x1f "
_JOIN = b"Q"  # stands for the apostrophe inside a word; lower-case text holds no other "Q"
_APOSTROPHE = re.compile(rb"'(?<=[a-z]')([a-z]+'?)")
_JOINED = _JOIN + rb"\1"
_TOKEN_BYTES = re.compile(rb"[a-z]+(?:'[a-z]+)?|[0-9]+|[^a-z0-9_\t-\r\x1c- ]")
_NUMERAL_BYTES = re.compile(rb"[0-9]+(?:[.,][0-9]+)*")
_HOW_MANY = re.compile(rb"how(?<=\bhow) m(?:any|uch)\b")
_QUANTITY_SET = frozenset(_QUANTITY_WORDS.encode().split())


def _only(kept: str) -> bytes:
    """A translation that makes a space of everything but `kept`."""
    return bytes(c if chr(c) in kept else 32 for c in range(256))


_LETTERS = _only(ascii_lowercase + _JOIN.decode())
_DIGITS = _only(digits)
_NUMERIC = _only(digits + ".,")
_RUNS = _only(ascii_lowercase + digits + "_")
_SENTENCE = bytes(46 if chr(c) in ".!?" else 32 if chr(c) in _SPACE else 97 for c in range(256))
_NO_TOKENS = (ascii_letters + digits + "_" + _SPACE).encode()
_NO_SIGNS = (ascii_letters + digits + "_ ").encode()
_NO_UPPER = bytes(c for c in range(128) if chr(c) not in ascii_uppercase)


def read_words(text: str) -> Words:
    """Count what `text` is made of; time is proportional to its length."""
    return _read_ascii(text) if text.isascii() else _read_any(text)


def language_words(text: str) -> list[str]:
    """Runs of letters, in lower case."""
    if text.isascii():
        return text.lower().encode().translate(_LETTERS).decode().split()
    return _LANGUAGE_WORD.findall(text.lower())


def _read_ascii(text: str) -> Words:
    raw = text.encode()
    low = raw.lower()
    joined = _APOSTROPHE.sub(_JOINED, low) if b"'" in low else low
    words = joined.translate(_LETTERS).split()
    vocabulary = set(words)
    signs = joined.translate(None, _NO_TOKENS)
    numbers = raw.translate(_DIGITS).split()
    tokens = len(words) + len(signs) + len(numbers)
    ends = _ends_of_ascii(low, tokens)
    numerals: list[int] = []
    if numbers:
        numeric = b" ".join(raw.translate(_NUMERIC).split())
        numerals = list(map(len, _NUMERAL_BYTES.findall(numeric)))
        ends = [b"0" if t.isdigit() else t for t in ends]
    sentences = raw.translate(_SENTENCE)
    return Words(
        ends,
        tokens,
        len(vocabulary) + len(set(signs)) + bool(numbers),
        len(words),
        len(b"".join(words)),
        numerals,
        len(raw.translate(None, _NO_UPPER)),
        sentences.count(b". ") + sentences.endswith(b"."),
        _quantities_of_ascii(low, vocabulary),
        0,
        raw.translate(None, _NO_SIGNS).decode(),
    )


def _ends_of_ascii(low: bytes, tokens: int) -> list[bytes]:
    if tokens > HEAD_WORDS + TAIL_WORDS:
        # White space separates tokens, so so many pieces hold at least as many, if no piece is
        # empty of them ("_" is).
        first, last = low.split(None, HEAD_WORDS), low.rsplit(None, TAIL_WORDS)
        head = _TOKEN_BYTES.findall(b" ".join(first[:HEAD_WORDS]))
        tail = _TOKEN_BYTES.findall(b" ".join(last[-TAIL_WORDS:]))
        if len(head) >= HEAD_WORDS and len(tail) >= TAIL_WORDS:
            return [*head[:HEAD_WORDS], *tail[-TAIL_WORDS:]]
    return _both_ends(_TOKEN_BYTES.findall(low))


def _quantities_of_ascii(low: bytes, vocabulary: set[bytes]) -> int:
    count = len(_HOW_MANY.findall(low))
    # An apostrophe ends a word here, but not in the vocabulary.
    parts = {part for word in vocabulary if _JOIN in word for part in word.split(_JOIN)}
    if b"remain" in low or not _QUANTITY_SET.isdisjoint(vocabulary | parts):
        runs = b" " + low.translate(_RUNS)
        count += runs.count(b" remain")
        count += sum(map(_QUANTITY_SET.__contains__, runs.split()))
    return count


def _read_any(text: str) -> Words:
    found = _TOKEN.findall(text.lower())
    tokens = ["0" if t[0].isdigit() else t for t in found]
    words = [t for t in tokens if t[0].isalpha()]
    return Words(
        # A lone surrogate is legal in a Python string and must not fail a request.
        ends=[t.encode("utf-8", "surrogatepass") for t in _both_ends(tokens)],
        tokens=len(tokens),
        distinct=len(set(tokens)),
        words=len(words),
        word_chars=sum(map(len, words)),
        numerals=list(map(len, _NUMERAL.findall(text))),
        upper=sum(map(str.isupper, text)),
        sentences=len(_SENTENCE_END.findall(text)),
        quantities=len(_QUANTITIES.findall(text)),
        non_ascii=sum(not c.isascii() for c in text),
        signs=text,
    )


def _both_ends(tokens: list[T]) -> list[T]:
    if len(tokens) <= HEAD_WORDS + TAIL_WORDS:
        return tokens
    return [*tokens[:HEAD_WORDS], *tokens[-TAIL_WORDS:]]
