"""Kinds of events: what one event of a stream says, in the format of each API.

The first event of kind CONTENT commits a stream to its SLM; before it another SLM may answer.
Most events of a stream are content. They are known by their bytes (`_PLAIN_CONTENT`); only the
others are parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any

from pydantic_core import from_json

from calm_serve.upstreams.events import Event


class Api(StrEnum):
    """An HTTP interface: what a body and its answer look like, and the end of its path."""

    CHAT = "chat/completions"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"  # Anthropic's


class EventKind(StrEnum):
    """What an event says. FINISH: why an answer ended; END: nothing follows."""

    KEEPALIVE = "keepalive"
    EMPTY = "empty"
    CONTENT = "content"
    FINISH = "finish"
    USAGE = "usage"  # nothing but usage
    ERROR = "error"
    END = "end"


Document = Mapping[str, Any]

DONE = b"[DONE]"
_KEEPALIVES = (b"ping", b"keepalive", b"keep-alive", b"heartbeat")
_TELLING_NAMES = frozenset([b"error", *_KEEPALIVES])  # whatever the data are

# An event with content in its usual form. A match is proof: every quote and brace is accounted for,
# so nothing in a text can look like a field. Keys that say more than content are left out. The
# quantifiers are possessive, so that no text makes them slow.
_CHARACTERS = rb'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})'
_TEXT = rb'"' + _CHARACTERS + rb'++"'
_NUMBER = rb"-?(?:0|[1-9]\d*+)(?:\.\d++)?+"
_SAYS_MORE = rb'(?!(?:error|usage|choices|x_groq|type|object|delta|message|response|text)")'
_FIELD = (
    rb'(?:"' + _SAYS_MORE + rb'[a-z_]++": ?(?:"' + _CHARACTERS + rb'*+"|' + _NUMBER + rb"|null"
    rb'|true|false)|"object": ?"(?!error")[a-z._]++"|"(?:usage|error)": ?null)'
)
_FIELDS = rb"(?:" + _FIELD + rb", ?)*+"
_MORE_FIELDS = rb"(?:, ?" + _FIELD + rb")*+"
_CHOICE = _FIELDS + rb'"choices": ?\[\{"index": ?\d{1,4}, ?'
_NULLS = (
    rb'(?:, ?"(?:logprobs|finish_reason|stop_reason|token_ids|content_filter_results)": ?null)*+'
)
_CHOICE_END = _NULLS + rb"\}\]" + _MORE_FIELDS
_DELTA = (
    rb'"delta": ?\{(?:"role": ?"assistant", ?)?+'
    rb'"(?:content|reasoning|reasoning_content)": ?' + _TEXT + rb"\}"
)
_PART = (
    rb'"type": ?"(?:text|input_json|thinking)_delta", ?"(?:text|partial_json|thinking)": ?' + _TEXT
)
_TYPE = rb'"type": ?"response\.[a-z_.]+\.delta"'
_CHANGE = _FIELDS + rb'"delta": ?' + _TEXT + rb'(?:, ?(?:"logprobs": ?\[\]|' + _FIELD + rb"))*+"
_PLAIN_CONTENT: dict[Api, re.Pattern[bytes]] = {
    api: re.compile(rb"\{" + pattern + rb"\}")
    for api, pattern in {
        Api.CHAT: _CHOICE + _DELTA + _CHOICE_END,
        Api.COMPLETIONS: _CHOICE + rb'"text": ?' + _TEXT + _CHOICE_END,
        Api.MESSAGES: rb'"type": ?"content_block_delta", ?"index": ?\d{1,4}, ?"delta": ?\{'
        + _PART
        + rb"\}",
        # OpenAI has the type first, vLLM last.
        Api.RESPONSES: rb"(?:"
        + _TYPE
        + rb", ?"
        + _CHANGE
        + rb"|"
        + _CHANGE
        + rb", ?"
        + _TYPE
        + rb")",
    }.items()
}
# A regular expression on a longer event is no faster than parsing it.
_MAX_PLAIN_BYTES = 4096


def classify(event: Event, api: Api) -> tuple[EventKind, Document | None]:
    """Return the kind of an event, and its document where one was parsed.

    Content in its usual form is not parsed; its document is None and nothing else is in it.
    """
    data = event.data
    if (
        data is not None
        and len(data) <= _MAX_PLAIN_BYTES
        and event.name not in _TELLING_NAMES
        and _PLAIN_CONTENT[api].fullmatch(data)
    ):
        return EventKind.CONTENT, None
    return classify_parsed(event, api)


def classify_parsed(event: Event, api: Api) -> tuple[EventKind, Document | None]:
    """As `classify`, by parsing every event."""
    if event.data is None or event.name in _KEEPALIVES or not event.data.strip():
        kind = EventKind.ERROR if event.name == b"error" else EventKind.KEEPALIVE
        return kind, None
    if event.data.strip() == DONE:
        return EventKind.END, None
    document = parse_object(event.data)
    if document is None:
        return EventKind.ERROR, None
    if event.name == b"error" or is_error(document):
        return EventKind.ERROR, document
    return _KINDS[api](document), document


def parse_object(data: bytes) -> Document | None:
    """Return the JSON object in `data`; None when it is no object.

    What some upstreams send is read: halves of surrogate pairs, NaN, bytes that are no UTF-8.
    """
    try:
        found = from_json(data)
    except ValueError:
        try:
            found = json.loads(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, dict) else None


def is_error(document: Document) -> bool:
    """True for an error document of any API, alone or beside choices."""
    if document.get("error") or document.get("object") == "error":
        return True
    kind = document.get("type")
    if kind in ("error", "response.failed"):
        return True
    return any(c.get("error") or c.get("finish_reason") == "error" for c in choices_of(document))


def choices_of(document: Document) -> Iterator[Document]:
    """Yield the choices that are objects."""
    choices = document.get("choices")
    if isinstance(choices, list):
        yield from (c for c in choices if isinstance(c, Mapping))


# Fields of a choice's text, delta or message that say nothing to the client.
_SILENT = ("role", "name", "id", "provider_specific_fields", "extra_content")


def has_content(choice: Document) -> bool:
    """True when a choice of chat or completions carries any part of an answer."""
    if choice.get("text") or choice.get("token_ids"):
        return True
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, Mapping) and any(logprobs.values()):
        return True
    message = choice.get("delta") or choice.get("message")
    if not isinstance(message, Mapping):
        return False
    return any(value for field, value in message.items() if field not in _SILENT)


def _choices_kind(document: Document) -> EventKind:
    choices = list(choices_of(document))
    if any(has_content(choice) for choice in choices):
        return EventKind.CONTENT
    if any(choice.get("finish_reason") for choice in choices):
        return EventKind.FINISH
    if not choices and isinstance(document.get("usage"), Mapping):
        return EventKind.USAGE
    return EventKind.EMPTY


# Events that only announce what comes.
_RESPONSES_EMPTY = (
    "response.created",
    "response.queued",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.reasoning_part.added",
    "response.reasoning_summary_part.added",
)
RESPONSES_ENDS = ("response.completed", "response.incomplete", "response.done")


def _responses_kind(document: Document) -> EventKind:
    kind = document.get("type")
    if kind in RESPONSES_ENDS:
        return EventKind.END
    if kind in ("keepalive", "ping"):
        return EventKind.KEEPALIVE
    if kind in _RESPONSES_EMPTY or not isinstance(kind, str):
        return EventKind.EMPTY
    if kind.endswith(".delta") and not document.get("delta"):
        return EventKind.EMPTY
    return EventKind.CONTENT


def _messages_kind(document: Document) -> EventKind:
    kind = document.get("type")
    if kind == "message_stop":
        return EventKind.END
    if kind == "ping":
        return EventKind.KEEPALIVE
    if kind == "message_delta":
        delta = document.get("delta")
        stopped = isinstance(delta, Mapping) and delta.get("stop_reason")
        return EventKind.FINISH if stopped else EventKind.EMPTY
    part = document.get("content_block" if kind == "content_block_start" else "delta")
    if kind in ("content_block_start", "content_block_delta") and isinstance(part, Mapping):
        return EventKind.CONTENT if block_has_content(part) else EventKind.EMPTY
    return EventKind.EMPTY


def block_has_content(block: Document) -> bool:
    """True when a content block of Anthropic, or its delta, carries any part of an answer.

    A tool call does from its start, by its name.
    """
    return any(value for field, value in block.items() if field not in ("type", "citations"))


_KINDS: dict[Api, Callable[[Document], EventKind]] = {
    Api.CHAT: _choices_kind,
    Api.COMPLETIONS: _choices_kind,
    Api.RESPONSES: _responses_kind,
    Api.MESSAGES: _messages_kind,
}
