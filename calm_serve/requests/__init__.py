"""Requests: an HTTP body becomes plain fields and numbers. Owner: router. Never blocks.

Takes the parsed body and the headers, gives a `RoutingContext` without prompt text. Touches
nothing else: no files, no network, no state between requests.
"""

from calm_serve.requests.context import BLOCK_CHARS, MAX_BLOCKS, ContextBuilder, prefix_chain
from calm_serve.requests.features import BUCKETS, NUMBER_NAMES, fill_features, text_buckets
from calm_serve.requests.openai import (
    ChatRequest,
    Overrides,
    parse_chat,
    parse_completion,
    parse_overrides,
)
from calm_serve.requests.tokens import mixed_bits

__all__ = [
    "BLOCK_CHARS",
    "BUCKETS",
    "MAX_BLOCKS",
    "NUMBER_NAMES",
    "ChatRequest",
    "ContextBuilder",
    "Overrides",
    "fill_features",
    "mixed_bits",
    "parse_chat",
    "parse_completion",
    "parse_overrides",
    "prefix_chain",
    "text_buckets",
]
