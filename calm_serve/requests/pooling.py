"""Parse requests that generate nothing: embeddings, ranking, scores, tokenizers' answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calm_serve.errors import RequestError
from calm_serve.requests.parsed import (
    ParsedRequest,
    check_count,
    prefix_seed,
    read_model,
    read_object,
    read_prompts,
    read_truncation,
    unmarked,
)
from calm_serve.requests.transcript import (
    Transcript,
    check_messages,
    read_message,
    read_messages,
)
from calm_serve.types import Task

# Names of the two sides of a comparison in vLLM's bodies.
_SIDES = (
    ("query", "documents"),
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
    ("text_1", "text_2"),
)


def parse_embeddings(body: Any) -> ParsedRequest:
    """Read a `/v1/embeddings` body: texts, token ids or messages. Raises RequestError."""
    body = read_object(body)
    name = "messages" if body.get("messages") is not None else "input"
    value = body.get(name)
    conversations = _conversations(value, name)
    if conversations is None and name == "messages":
        check_messages(value, name)
    fields = (
        {
            **(prompts := read_prompts(value, name, may_be_empty=True)).fields(),
            "choices": prompts.count,
            "needs": (),
        }
        if conversations is None
        else _read_conversations(conversations, name)
    )
    return ParsedRequest(**fields, **_common(body, "/v1/embeddings", Task.EMBED))


def parse_rerank(body: Any) -> ParsedRequest:
    """Read a `/v1/rerank` body: a query and documents. Raises RequestError."""
    return _parse_pairs(read_object(body), "/v1/rerank", _SIDES[:1])


def parse_score(body: Any) -> ParsedRequest:
    """Read a `/v1/score` body: two sides, under one of vLLM's names. Raises RequestError."""
    return _parse_pairs(read_object(body), "/v1/score", _SIDES[1:])


def _common(body: Mapping[str, Any], route: str, task: Task) -> dict[str, Any]:
    return {
        "route": route,
        "task": task,
        "model": read_model(body),
        "max_output_tokens": 0,
        "truncate_tokens": read_truncation(body),
        "prefix_seed": prefix_seed(body),
    }


def _conversations(value: Any, name: str) -> list[Any] | None:
    """Return the conversations of a field that holds one or several; None when it holds none."""
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], Mapping):
        return [check_messages(value, name)]
    if isinstance(value[0], list) and value[0] and isinstance(value[0][0], Mapping):
        return check_messages(value, name)
    return None


def _read_conversations(conversations: list[Any], name: str) -> dict[str, Any]:
    together, longest = Transcript(), 0
    single = len(conversations) == 1
    for number, messages in enumerate(conversations):
        where = name if single else f"{name}[{number}]"
        own = Transcript()
        for position, message in enumerate(check_messages(messages, where)):
            read_message(message, own, f"{where}[{position}]")
        together.extend(own)
        longest = max(longest, len(own.fields(where)["text"]))
    return {
        **together.fields(name),
        "choices": len(conversations),
        "needs": together.needs(),
        "sequence_chars": None if single else longest,
    }


def _parse_pairs(
    body: Mapping[str, Any], route: str, sides: tuple[tuple[str, str], ...]
) -> ParsedRequest:
    for first, second in sides:
        if body.get(first) is not None and body.get(second) is not None:
            break
    else:
        first, second = sides[0]
        missing = second if body.get(first) is not None else first
        raise RequestError(f"{missing!r} is missing", param=missing)
    media = Transcript()
    queries = _texts(body[first], first, media)
    documents = _texts(body[second], second, media)
    count = max(len(queries), len(documents))
    # The query comes first in every sequence that the engine computes.
    text = unmarked("\n".join((*queries, *documents)))
    return ParsedRequest(
        text=text,
        last_user=text,
        choices=count,
        sequence_chars=max(map(len, queries)) + max(map(len, documents)),
        needs=tuple(name for name in media.needs() if name != "chat"),
        **_common(body, route, Task.RERANK),
    )


def _texts(value: Any, name: str, media: Transcript) -> list[str]:
    """Return the texts of one side: a text, an object with parts, or a list of them."""
    entries = value if isinstance(value, list) else [value]
    check_count(entries, name)
    texts = []
    for entry in entries:
        if isinstance(entry, str):
            texts.append(entry)
        elif isinstance(entry, Mapping):
            content = entry.get("content", entry.get("text"))
            texts.append(media.read_content(content, name))
        else:
            raise RequestError(f"{name!r} must be a text or a list of texts", param=name)
    if not texts:
        raise RequestError(f"{name!r} must not be empty", param=name)
    return texts


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
