"""What a predictor reads of a prompt: numbers, and the presence of hashed words.

Word hashing sees the first and last words of the last user message. Everything is plain data
afterwards, so a logged context replays to the same decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm_serve.requests.openai import ChatRequest
from calm_serve.requests.tokens import Hashes, Words, ends, pair_hashes, read_words, word_hashes
from calm_serve.types import WORD_BUCKETS, OutputShape, PromptFeatures, RoutingContext

FOCUS_CHARS = 512
BUCKETS = 2 * WORD_BUCKETS

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
_QUANTITIES = word_hashes(
    "each every per times twice half double more less fewer total left altogether many much remain"
    " remains remaining"
)


def fill_features(context: RoutingContext, request: ChatRequest) -> None:
    """Put what a predictor reads of the prompt into `context`, unless it is there.

    They cost more than the rest of the context together, and a rule needs none of them. So they
    are added to a record that exists: by the decision where it predicts, or when the answer is out.
    """
    if context.features.numbers:
        return
    focus = ends(request.last_user, FOCUS_CHARS)
    words = read_words(focus)
    numbers = _numbers(request, context, focus, words)
    object.__setattr__(context, "features", PromptFeatures(numbers, word_buckets(words.hashes)))


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
    return word_buckets(read_words(ends(text, FOCUS_CHARS)).hashes)


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
    return dict(zip(NUMBER_NAMES, context.features.numbers, strict=True))
