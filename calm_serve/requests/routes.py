"""The routes of vLLM's server that this service forwards: an allow-list.

What is not here is not reachable, above all what controls an engine: loading adapters, sleeping,
resetting caches, profiling, remote calls. Also left out are routes of vLLM that need more than a
decision about an SLM: `/v1/responses/{id}` (nothing is stored), batches, rendering, classification,
pooling, speech, and Cohere's bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from calm_serve.errors import CalmError
from calm_serve.requests.anthropic import parse_count_tokens, parse_messages
from calm_serve.requests.openai import parse_chat, parse_completion
from calm_serve.requests.parsed import ParsedRequest
from calm_serve.requests.pooling import (
    parse_detokenize,
    parse_embeddings,
    parse_rerank,
    parse_score,
    parse_tokenize,
)
from calm_serve.requests.responses import parse_responses
from calm_serve.types import Task


class ErrorFormat(StrEnum):
    """Whose error documents a route has."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Route:
    """One route; all are POST."""

    path: str  # of this service and of the engine
    task: Task
    parse: Callable[[Any], ParsedRequest]
    may_stream: bool = False
    error_format: ErrorFormat = ErrorFormat.OPENAI

    def error_body(self, error: CalmError) -> dict[str, Any]:
        """Return the error document in the route's format."""
        if self.error_format is ErrorFormat.ANTHROPIC:
            return error.to_anthropic()
        return error.to_openai()


_TABLE = (
    Route("/v1/chat/completions", Task.GENERATE, parse_chat, may_stream=True),
    Route("/v1/completions", Task.GENERATE, parse_completion, may_stream=True),
    Route("/v1/responses", Task.GENERATE, parse_responses, may_stream=True),
    Route("/v1/messages", Task.GENERATE, parse_messages, True, ErrorFormat.ANTHROPIC),
    Route(
        "/v1/messages/count_tokens",
        Task.GENERATE,
        parse_count_tokens,
        error_format=ErrorFormat.ANTHROPIC,
    ),
    Route("/v1/embeddings", Task.EMBED, parse_embeddings),
    Route("/v1/rerank", Task.RERANK, parse_rerank),
    Route("/v2/rerank", Task.RERANK, parse_rerank),
    Route("/rerank", Task.RERANK, parse_rerank),
    Route("/v1/score", Task.RERANK, parse_score),
    Route("/score", Task.RERANK, parse_score),
    Route("/tokenize", Task.ANY, parse_tokenize),
    Route("/detokenize", Task.ANY, parse_detokenize),
)
ROUTES: Mapping[str, Route] = {route.path: route for route in _TABLE}


def find_route(path: str) -> Route | None:
    """Return the route of a path; one slash at its end is passed over. None for any other path.

    >>> find_route("/v1/embeddings/").task
    <Task.EMBED: 'embed'>
    >>> find_route("/v1/load_lora_adapter") is None
    True
    """
    return ROUTES.get(path.removesuffix("/"))
