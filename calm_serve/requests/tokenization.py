"""Parse requests that only a tokenizer answers."""

from __future__ import annotations

from typing import Any

from calm_serve.errors import RequestError
from calm_serve.requests.parsed import (
    ParsedRequest,
    read_model,
    read_object,
    read_prompts,
)
from calm_serve.requests.transcript import Transcript, read_messages
from calm_serve.types import Task


def parse_tokenize(body: Any) -> ParsedRequest:
    """Read a `/tokenize` body: a prompt, or messages. Raises RequestError naming the parameter."""
    body = read_object(body)
    fields: dict[str, Any]
    if body.get("messages") is not None:
        transcript = Transcript()
        read_messages(body, transcript)
        fields = {**transcript.fields(), "needs": transcript.needs()}
    else:
        fields = read_prompts(body.get("prompt"), "prompt", may_be_empty=True).fields()
    return _tokenizer_request("/tokenize", body, fields)


def parse_detokenize(body: Any) -> ParsedRequest:
    """Read a `/detokenize` body: token ids. Raises RequestError naming the parameter."""
    body = read_object(body)
    ids = body.get("tokens")
    if not isinstance(ids, list) or set(map(type, ids)) - {int}:
        raise RequestError("'tokens' must be a list of token ids", param="tokens")
    fields = {"is_token_ids": True, "input_tokens": len(ids)}
    return _tokenizer_request("/detokenize", body, fields)


def _tokenizer_request(route: str, body: Any, fields: dict[str, Any]) -> ParsedRequest:
    return ParsedRequest(
        **fields,
        route=route,
        task=Task.ANY,
        tokenizer_only=True,
        model=read_model(body),
        max_output_tokens=0,
        truncate_tokens=-1,  # a prompt of any length has tokens
    )
