"""Prompt features of the predictors: numbers, and the presence of hashed tokens.

Token hashing sees the first and last tokens of the user's last message, and of the one before that
it continues. Features are plain data, so
a logged context replays to the same decision.
"""

from __future__ import annotations

import math

import numpy as np

from calm_serve.requests.parsed import ParsedRequest
from calm_serve.requests.tokens import (
    Hashes,
    TokenStats,
    ends,
    pair_hashes,
    read_tokens,
    token_hashes,
)
from calm_serve.types import (
    FIRST_WORD,
    SEEN_BITS,
    WORD_BUCKETS,
    OutputShape,
    PromptFeatures,
    RoutingContext,
)

FOCUS_CHARS = 512  # at each end of the last user message
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
_QUANTITIES = token_hashes(
    "each every per times twice half double more less fewer total left altogether many much remain"
    " remains remaining"
)


def fill_features(context: RoutingContext, request: ParsedRequest) -> None:
    """Add the prompt's features to `context`, unless it has them, or nothing is generated.

    They take more time than the rest of the context, and a rule needs none of them. So they are
    added to the existing record only when needed: before a prediction, or, for the log, after the
    answer to a request that a rule decided.
    """
    if context.features.numbers or not context.generates:
        return
    text = request.last_user
    if context.follows_up:
        text = f"{request.followed_user}\n{text}"
    focus = ends(text, FOCUS_CHARS)
    tokens = read_tokens(focus)
    numbers = _numbers(request, context, focus, tokens)
    features = PromptFeatures(numbers, token_buckets(tokens.hashes), token_bits(tokens.hashes))
    object.__setattr__(context, "features", features)


def token_buckets(hashes: Hashes) -> tuple[int, ...]:
    """Return tokens and pairs of neighbours as `BUCKETS` presence features (feature hashing)."""
    half = WORD_BUCKETS
    # The high bits of the product in a hash are its best mixed ones.
    shift = np.uint64(64 - half.bit_length() + 1)
    present = np.zeros(BUCKETS, dtype=np.bool_)
    present[hashes >> shift] = True
    present[half:][pair_hashes(hashes) >> shift] = True
    return tuple((present.nonzero()[0] + FIRST_WORD).tolist())


def token_bits(hashes: Hashes) -> tuple[int, ...]:
    """Return tokens and pairs of neighbours as `PromptFeatures.bits`.

    Enough bits that a new token rarely has that of a known one; buckets are too few for that.
    """
    half = SEEN_BITS // 2
    shift = np.uint64(64 - half.bit_length() + 1)
    pairs = (pair_hashes(hashes) >> shift) + np.uint64(half)
    return tuple(sorted({*(hashes >> shift).tolist(), *pairs.tolist()}))


def text_hashes(text: str) -> Hashes:
    """Return the hashes that the features of a prompt with this text are made of."""
    return read_tokens(ends(text, FOCUS_CHARS)).hashes


def text_buckets(text: str) -> tuple[int, ...]:
    """Return `PromptFeatures.buckets` of a prompt with this text."""
    return token_buckets(text_hashes(text))


def text_bits(text: str) -> tuple[int, ...]:
    """Return `PromptFeatures.bits` of a prompt with this text."""
    return token_bits(text_hashes(text))


def _numbers(
    request: ParsedRequest, context: RoutingContext, text: str, tokens: TokenStats
) -> tuple[float, ...]:
    size = max(tokens.bytes, 1)
    shape = request.output_shape
    upper, lower, digit, question_marks, quotes, slashes, braces, operators, newlines = (
        tokens.characters
    )
    return (
        math.log1p(context.prompt_chars),
        math.log1p(len(request.last_user)),
        float(tokens.words),
        (upper + lower) / max(tokens.words, 1),
        float(request.turns),
        1.0 if request.system_chars else 0.0,
        math.log1p(request.system_chars),
        1.0 if shape in (OutputShape.JSON, OutputShape.JSON_SCHEMA) else 0.0,
        1.0 if shape is OutputShape.TOOLS else 0.0,
        1.0 if shape is OutputShape.GUIDED else 0.0,
        math.log1p(request.max_output_tokens or 0),
        float(tokens.numerals),
        float(tokens.large_numerals),
        digit / size,
        upper / size,
        (tokens.tokens - tokens.words - tokens.numerals) / size,
        float(tokens.sentences),
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
        tokens.non_ascii / size,
        float(len(_QUANTITIES & tokens.vocabulary)),
        len(tokens.vocabulary) / max(len(tokens.hashes), 1),
    )
