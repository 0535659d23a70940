"""Tokens of a text of bounded length: counts, and a hash for each token.

A token is a run of letters, a run of digits, or one other character that is not a space. From
U+2000 on, where scripts have no blanks between words, every character is a token. The text is one
array of bytes, and each step is one numpy call for all of it: a thousand characters take about 30
us.
"""

from __future__ import annotations

import re
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 8192
HEAD_TOKENS, TAIL_TOKENS = 48, 16  # of a longer text only these are hashed
LARGE_DIGITS = 3
_SPACE, _LETTER, _DIGIT, _SIGN, _INSIDE = range(5)
_MASK = (1 << 64) - 1
_NUMBER = 0x9E3779B97F4A7C15  # the hash of every run of digits; also SplitMix64's odd multiplier
_FACTOR = 0xD1342543DE82EF95  # of the polynomial; odd, so that it has an inverse modulo 2**64

Hashes = NDArray[np.uint64]
Places = NDArray[np.intp]


class TokenStats(NamedTuple):
    """Counts and hashes of a text's tokens."""

    hashes: Hashes  # of the first and last tokens, in lower case; all numerals have one hash
    vocabulary: set[int]  # the distinct hashes
    tokens: int
    words: int
    numerals: int
    large_numerals: int  # of more than LARGE_DIGITS digits
    sentences: int
    characters: tuple[int, ...]  # by CHARACTERS
    non_ascii: int  # bytes
    bytes: int


# Characters that are counted, by name; the index of a name is its class.
CHARACTERS = {
    "upper": ascii_uppercase,
    "lower": ascii_lowercase,
    "digit": digits,
    "question_mark": "?",
    "quote": "\"'",
    "slash": "/~",
    "brace": "{[<",
    "operator": "=+*|",
    "newline": "\n",
}


def _kind_of(byte: int) -> int:
    character = chr(byte)
    if byte >= 0xE2 or byte == 0xC2:  # leads a character from U+2000, or a Latin-1 sign
        return _SIGN
    if byte >= 0x80:
        return _LETTER if byte >= 0xC0 else _INSIDE
    if character in ascii_letters:
        return _LETTER
    if character in digits:
        return _DIGIT
    return _SPACE if character in "_ \x7f" or byte < 32 else _SIGN


def _class_of(byte: int) -> int:
    found = [i for i, members in enumerate(CHARACTERS.values()) if chr(byte) in members]
    return found[0] if found else len(CHARACTERS)


def mixed_bits(number: int) -> int:
    """Mix 64 bits so that each one depends on all (SplitMix64's finaliser)."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


def _random_bits(number: int) -> int:
    """Random bits from a counter (SplitMix64, Steele and others, OOPSLA 2014)."""
    return mixed_bits((number + 1) * _NUMBER & _MASK)


_KINDS = bytes(map(_kind_of, range(256)))
_CLASSES = bytes(map(_class_of, range(256)))
_CLASS_COUNT = len(CHARACTERS) + 1
_STOPS = bytes(46 if chr(b) in ".!?" else 32 if _kind_of(b) == _SPACE else 97 for b in range(256))
_LETTERS_ONLY = bytes(b if chr(b) in ascii_lowercase else 32 for b in range(256))
_LETTERS = re.compile(r"[^\W\d_]+")
_VALUES = np.array([_random_bits(b) for b in range(256)], dtype=np.uint64)
_POWERS = np.array([pow(_FACTOR, i, 1 << 64) for i in range(MAX_BYTES)], dtype=np.uint64)
_INVERSES = np.array([pow(_FACTOR, -i, 1 << 64) for i in range(MAX_BYTES)], dtype=np.uint64)
_NONE = np.zeros(0, dtype=np.uint64)
_OUTER: Places = np.r_[0:HEAD_TOKENS, -TAIL_TOKENS:0]


def read_tokens(text: str) -> TokenStats:
    """Tokenize the first MAX_BYTES bytes of `text`.

    >>> read_tokens("Two apples, 12 pears?").words
    3
    """
    raw = text.encode("utf-8", "surrogatepass")[:MAX_BYTES]
    if not raw:
        return TokenStats(_NONE, set(), 0, 0, 0, 0, 0, (0,) * len(CHARACTERS), 0, 0)
    plain = raw.isascii()
    low = raw.lower() if plain else text.lower().encode("utf-8", "surrogatepass")[:MAX_BYTES]
    kinds = np.frombuffer(low.translate(_KINDS), dtype=np.uint8)
    starts, ends = _tokens(kinds, plain)
    of_token = kinds.take(starts)
    counts = np.bincount(of_token, minlength=_INSIDE).tolist()
    large = 0
    if counts[_DIGIT]:
        numerals = of_token == _DIGIT
        large = int(np.count_nonzero((ends - starts)[numerals] > LARGE_DIGITS))
    if len(starts) > HEAD_TOKENS + TAIL_TOKENS:
        starts, ends, of_token = starts.take(_OUTER), ends.take(_OUTER), of_token.take(_OUTER)
    hashes = _hashes(np.frombuffer(low, dtype=np.uint8), starts, ends)
    if counts[_DIGIT]:
        hashes[of_token == _DIGIT] = _NUMBER
    stops = raw.translate(_STOPS)
    classes = np.frombuffer(raw.translate(_CLASSES), dtype=np.uint8)
    return TokenStats(
        hashes,
        set(hashes.tolist()),
        sum(counts),
        counts[_LETTER],
        counts[_DIGIT],
        large,
        stops.count(b". ") + stops.endswith(b"."),
        tuple(np.bincount(classes, minlength=_CLASS_COUNT)[: len(CHARACTERS)].tolist()),
        0 if plain else sum(byte >= 0x80 for byte in raw),
        len(raw),
    )


def ends(text: str, limit: int) -> str:
    """Return the first and last `limit` characters of a text, or all of a shorter one."""
    if len(text) <= 2 * limit:
        return text
    return text[:limit] + "\n" + text[-limit:]


def letter_runs(text: str) -> list[str]:
    """Return runs of letters in lower case; several times faster than `read_tokens`."""
    if text.isascii():
        return text.lower().encode().translate(_LETTERS_ONLY).decode().split()
    return _LETTERS.findall(text.lower())


def token_hashes(text: str) -> frozenset[int]:
    """Return the distinct hashes of a text's tokens, to be looked up in a vocabulary."""
    return frozenset(read_tokens(text).vocabulary)


def pair_hashes(hashes: Hashes) -> Hashes:
    """Return one hash for each pair of neighbours; their order counts."""
    return np.asarray(hashes[:-1] * np.uint64(_FACTOR) + hashes[1:])


def _tokens(kinds: NDArray[np.uint8], plain: bool) -> tuple[Places, Places]:
    """Return where each token starts and ends: a run of one kind, or a single character."""
    begins = kinds == _SIGN
    if not plain:  # every byte of a character has its first byte's kind
        inside = kinds == _INSIDE
        lead = np.where(inside, 0, np.arange(len(kinds)))
        kinds = kinds.take(np.maximum.accumulate(lead))
    begins[1:] |= kinds[1:] != kinds[:-1]
    begins[0] = True
    edges = begins.nonzero()[0]
    tokens = kinds.take(edges).nonzero()[0]  # spaces are of kind 0
    after = np.append(edges, len(kinds))
    return edges.take(tokens), after.take(tokens + 1)


def _hashes(low: NDArray[np.uint8], starts: Places, ends: Places) -> Hashes:
    """Return polynomial hashes of tokens, as differences of sums over all bytes before."""
    sums = np.empty(len(low) + 1, dtype=np.uint64)
    sums[0] = 0
    np.cumsum(_VALUES.take(low) * _POWERS[: len(low)], out=sums[1:])
    found = (sums.take(ends) - sums.take(starts)) * _INVERSES.take(starts)
    return np.asarray(found * np.uint64(_NUMBER))
