"""Requests: an HTTP body becomes plain fields and numbers. Owner: router. Never blocks.

Takes a body and the headers, gives a `RoutingContext` without prompt text. `find_route` says which
routes there are and how each body is read. Touches nothing else: no files, no network, no state
between requests.
"""

from calm_serve.requests.body import parse_body
from calm_serve.requests.context import BLOCK_CHARS, MAX_BLOCKS, ContextBuilder, prefix_chain
from calm_serve.requests.features import (
    BUCKETS,
    NUMBER_NAMES,
    fill_features,
    text_bits,
    text_buckets,
    text_hashes,
    token_bits,
)
from calm_serve.requests.languages import load_detector, needs_detector
from calm_serve.requests.openai import parse_chat, parse_completion
from calm_serve.requests.overrides import Overrides, parse_overrides
from calm_serve.requests.parsed import ParsedRequest
from calm_serve.requests.routes import ROUTES, ErrorFormat, Route, find_route
from calm_serve.requests.tokens import mixed_bits

__all__ = [
    "BLOCK_CHARS",
    "BUCKETS",
    "MAX_BLOCKS",
    "NUMBER_NAMES",
    "ROUTES",
    "ContextBuilder",
    "ErrorFormat",
    "Overrides",
    "ParsedRequest",
    "Route",
    "fill_features",
    "find_route",
    "load_detector",
    "mixed_bits",
    "needs_detector",
    "parse_body",
    "parse_chat",
    "parse_completion",
    "parse_overrides",
    "prefix_chain",
    "text_bits",
    "text_buckets",
    "text_hashes",
    "token_bits",
]
