"""The only place where a request becomes numbers.

No tokenizer, bounded in time for any prompt length but for one thing: safety patterns see the whole
text, which is as long as the body may be. Markers see its first and last `SCAN_CHARS` characters,
word hashing the first and last words of the last user message, the prefix chain the first
`MAX_BLOCKS` blocks. Everything is plain data afterwards, so a logged context replays to the same
decision.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import numpy as np

from calm_serve.analyze.patterns import Pattern, Patterns, plain
from calm_serve.analyze.request import ChatRequest, Overrides
from calm_serve.analyze.words import (
    Hashes,
    Words,
    language_words,
    pair_hashes,
    read_words,
    word_hashes,
)
from calm_serve.config import Fleet, SLMSpec
from calm_serve.types import WORD_BUCKETS, OutputShape, RoutingContext, SLMState

SCAN_CHARS = 1024
FOCUS_CHARS = 512
LANGUAGE_CHARS = 256
BUCKETS = 2 * WORD_BUCKETS
BLOCK_CHARS = 128
MAX_BLOCKS = 64
CHARS_PER_TOKEN = 4.0  # estimate for English; the engine counts for real

NUMBER_NAMES: tuple[str, ...] = (
    "log_prompt_chars",
    "log_user_chars",
    "user_words",
    "mean_word_chars",
    "turns",
    "has_system",
    "log_system_chars",
    "shape_json",
    "shape_tools",
    "shape_guided",
    "log_max_output_tokens",
    "numerals",
    "large_numerals",
    "digit_ratio",
    "upper_ratio",
    "punctuation_ratio",
    "sentences",
    "question_marks",
    "quotes",
    "slashes",
    "braces",
    "operators",
    "newlines",
    "ends_with_question",
    "starts_upper",
    "has_code",
    "markers",
    "non_ascii_ratio",
    "quantity_words",
    "type_token_ratio",
)
LOAD_NAMES: tuple[str, ...] = (
    "load_ratio",
    "waiting",
    "kv_usage_ratio",
    "cached_prefix_ratio",
    "hot",
    "log_analytic_ttft",
)

_CODE = Pattern(
    r"```|^\s*(?:def |class |import |#include|function |SELECT )|Traceback \(most recent"
    r"|error: |\w\(\)|=>|::|;\s*$|\{\s*$",
    ignore_case=False,
)
# A few frequent words are enough to tell these languages apart in a sentence; others are "und".
# Words that English has too ("was", "as", "come", "per", "die") are left out of the other lists.
_FREQUENT = {
    "en": "the a an is are of to in and what how for with on my me i you it as was by which",
    "de": "der das und ist ein eine nicht ich zu mit auf wie für den",
    "fr": "le la les et est un une des du je pour dans que qui avec sur",
    "es": "el la los las y es un una de que en por con para como mi",
    "it": "il lo la gli e di un una che con sono non mi",
    "pt": "o a os e um uma de que em por com para como não meu",
}
_STOPWORDS = {code: frozenset(words.split()) for code, words in _FREQUENT.items()}
_ANY_STOPWORD = frozenset[str]().union(*_STOPWORDS.values())
_QUANTITIES = word_hashes(
    "each every per times twice half double more less fewer total left altogether many much remain"
    " remains remaining"
)

# Patterns see messages as lines, without roles; `^` is the start of a message or of a line.
_MESSAGE_START = re.compile("\x02\\w+\x03")


class ContextBuilder:
    """Turns requests into RoutingContexts for one fleet; compile once, use for every request."""

    def __init__(self, fleet: Fleet) -> None:
        self._markers = Patterns(dict(sorted(fleet.markers.items())))
        self._safety = [(s, Pattern(s.pattern)) for s in fleet.safety]

    def build(self, request: ChatRequest, overrides: Overrides, request_id: str) -> RoutingContext:
        """The context without features. Only the safety patterns' cost grows with the prompt."""
        whole = request.text
        both_agree = plain(whole)
        # Everything, not the ends: a secret in the middle is a secret. The body's size bounds it.
        lines = _lines(whole) if self._safety else ""
        short = self._safety and len(whole) <= 2 * SCAN_CHARS
        scan = lines if short else _lines(_ends(whole, SCAN_CHARS))
        safety = next((s for s, p in self._safety if p.occurs(lines, both_agree)), None)
        chain = prefix_chain(whole)
        session = overrides.session_id
        return RoutingContext(
            request_id=request_id,
            requested_model=request.model,
            prompt_chars=len(whole),
            prompt_tokens=max(1, round(len(whole) / CHARS_PER_TOKEN)),
            max_output_tokens=request.max_output_tokens,
            output_shape=request.output_shape,
            turns=request.turns,
            stream=request.stream,
            language=detect_language(request.last_user[:LANGUAGE_CHARS]),
            has_code=_CODE.occurs(_ends(request.last_user, FOCUS_CHARS), both_agree),
            has_image=request.has_image,
            safety_class=safety.name if safety else "none",
            markers=tuple(self._markers.found(scan, both_agree)),
            session_key=f"{_hash(session):08x}" if session else "",
            prefix_family=f"{chain[min(1, len(chain) - 1)]:08x}",
            prefix_chain=chain,
            slo_ttft_ms=overrides.slo_ttft_ms,
            slo_tpot_ms=overrides.slo_tpot_ms,
            deadline_s=overrides.deadline_s,
            local_only=overrides.local_only or bool(safety and safety.local_only),
            quality_floor=overrides.quality_floor,
        )


def add_features(context: RoutingContext, request: ChatRequest) -> None:
    """Put what a predictor reads of the prompt into `context`, unless it is there.

    They cost more than the rest of the context together, and a rule needs none of them. So they
    are added to a record that exists: by the decision where it predicts, or when the answer is out.
    """
    if context.numbers:
        return
    focus = _ends(request.last_user, FOCUS_CHARS)
    words = read_words(focus)
    object.__setattr__(context, "numbers", _numbers(request, context, focus, words))
    object.__setattr__(context, "buckets", word_buckets(words.hashes))


def prefix_chain(text: str) -> tuple[int, ...]:
    """Chained CRC-32 of the first blocks of `text`: equal prefixes give equal chain starts.

    The last, partial block is included, so that even a short prompt has a family. CRC is stable
    across processes (Python's hash is not), which is what lets routers agree without talking.

    >>> long = "You are a helpful assistant. " * 10
    >>> prefix_chain(long + "one")[0] == prefix_chain(long + "two")[0]
    True
    """
    size = BLOCK_CHARS * MAX_BLOCKS
    data = text[:size].encode("utf-8", "surrogatepass")[:size]  # a character is 1 to 4 bytes
    value = 0
    chain = [
        value := crc32(data[start : start + BLOCK_CHARS], value)
        for start in range(0, len(data), BLOCK_CHARS)
    ]
    return tuple(chain) or (0,)


def word_buckets(hashes: Hashes) -> tuple[int, ...]:
    """Words and pairs of neighbours as `BUCKETS` presence features (the hashing trick)."""
    half = WORD_BUCKETS
    # The high bits of a product are its best mixed ones.
    shift = np.uint64(64 - half.bit_length() + 1)
    present = np.zeros(BUCKETS, dtype=np.bool_)
    present[hashes >> shift] = True
    present[half:][pair_hashes(hashes) >> shift] = True
    return tuple(present.nonzero()[0].tolist())


def text_buckets(text: str) -> tuple[int, ...]:
    """What `RoutingContext.buckets` would be for a prompt of this text."""
    return word_buckets(read_words(_ends(text, FOCUS_CHARS)).hashes)


def detect_language(text: str) -> str:
    """ISO 639-1 code by counting frequent words; "und" when nothing tells.

    >>> detect_language("Wie ist das Wetter in Berlin?")
    'de'
    """
    words = language_words(text)
    hits = _ANY_STOPWORD.intersection(words)
    best, best_hits = "und", 0
    for code, stopwords in _STOPWORDS.items():
        count = len(hits & stopwords)
        if count > best_hits:
            best, best_hits = code, count
    # One word proves little: names and commands hold some. A request taken for the wrong language
    # finds no SLM, so plain ASCII letters are English unless two words say otherwise.
    return "en" if best_hits < 2 and words and text.isascii() else best


def load_vector(spec: SLMSpec, state: SLMState, analytic_ttft_s: float) -> tuple[float, ...]:
    """Live-state features of one candidate, in the order of LOAD_NAMES."""
    del spec
    return (
        state.load_ratio,
        float(state.waiting),
        state.kv_usage_ratio,
        state.cached_prefix_ratio,
        1.0 if state.replicas else 0.0,
        math.log(max(analytic_ttft_s, 1e-6)),
    )


def _hash(text: str) -> int:
    # A lone surrogate is legal in a Python string and must not fail a request.
    return crc32(text.encode("utf-8", "surrogatepass"))


def _lines(text: str) -> str:
    return _MESSAGE_START.sub("\n", text).lstrip("\n")


def _ends(text: str, limit: int) -> str:
    if len(text) <= 2 * limit:
        return text
    return text[:limit] + "\n" + text[-limit:]


def _numbers(
    request: ChatRequest, context: RoutingContext, text: str, words: Words
) -> tuple[float, ...]:
    size = max(words.bytes, 1)
    shape = request.output_shape
    upper, lower, digit, question_marks, quotes, slashes, braces, operators, newlines = (
        words.characters
    )
    return (
        math.log1p(len(request.text)),
        math.log1p(len(request.last_user)),
        float(words.words),
        (upper + lower) / max(words.words, 1),
        float(request.turns),
        1.0 if request.system_chars else 0.0,
        math.log1p(request.system_chars),
        1.0 if shape in (OutputShape.JSON, OutputShape.JSON_SCHEMA) else 0.0,
        1.0 if shape is OutputShape.TOOLS else 0.0,
        1.0 if shape is OutputShape.GUIDED else 0.0,
        math.log1p(request.max_output_tokens or 0),
        float(words.numerals),
        float(words.large_numerals),
        digit / size,
        upper / size,
        (words.tokens - words.words - words.numerals) / size,
        float(words.sentences),
        float(question_marks),
        float(quotes),
        float(slashes),
        float(braces),
        float(operators),
        float(newlines),
        1.0 if text.rstrip().endswith("?") else 0.0,
        1.0 if text[:1].isupper() else 0.0,
        1.0 if context.has_code else 0.0,
        float(len(context.markers)),
        words.non_ascii / size,
        float(len(_QUANTITIES & words.vocabulary)),
        len(words.vocabulary) / max(len(words.hashes), 1),
    )


def describe(context: RoutingContext) -> Mapping[str, Any]:
    """The numeric features by name, for explanations."""
    return dict(zip(NUMBER_NAMES, context.numbers, strict=True))
