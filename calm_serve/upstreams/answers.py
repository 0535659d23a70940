"""Answers: whether what an upstream gave is an answer, whole or streamed, and what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calm_serve.upstreams.error_documents import Origin, classify_error
from calm_serve.upstreams.events import Event
from calm_serve.upstreams.failures import Failure, FailureKind
from calm_serve.upstreams.fields import names
from calm_serve.upstreams.kinds import (
    DONE,
    Api,
    Document,
    EventKind,
    block_has_content,
    choices_of,
    classify,
    has_content,
    is_error,
    parse_object,
)
from calm_serve.upstreams.usage import MAX_CHOICES, Usage, usage_of

MAX_FINISH_REASONS = 8  # different ones that are kept of one answer
# Reasons for which an answer may be without content: the limit of tokens was reached before the
# first visible one, a filter or the model itself declined.
_MAY_BE_EMPTY = names(
    """length max_tokens max_output_tokens model_context_window_exceeded content_filter refusal
    pause_turn stop_sequence abort"""
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of an answer at its end."""

    failure: Failure | None = None
    usage: Usage | None = None  # None: the upstream did not report it
    finish_reasons: tuple[str, ...] = ()  # different ones, in order
    choices: int = 0
    lacks_end: bool = False  # a whole stream without its last event; `END_EVENTS` has it


# What ends a stream of each API.
END_EVENTS: dict[Api, bytes] = {
    Api.CHAT: b"data: " + DONE + b"\n\n",
    Api.COMPLETIONS: b"data: " + DONE + b"\n\n",
    Api.RESPONSES: b"",
    Api.MESSAGES: b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
}


def may_be_empty(body: Mapping[str, Any]) -> bool:
    """True for a request whose right answer may be without any content.

    It asks for no token or for the prompt only, or has stop texts, of which the first token may be
    one (evaluation harnesses), or a suffix to which nothing is missing (code completion).
    """
    limits = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    if any(body.get(name) == 0 for name in limits):
        return True
    asked = ("echo", "suffix", "stop", "stop_sequences", "stop_token_ids", "prompt_logprobs")
    return any(body.get(name) for name in asked)


def wrong_content_type(content_type: str, *, stream: bool, origin: Origin) -> Failure | None:
    """Return the failure that a 200's content type means by itself; None if it may be an answer.

    No type, or one that says nothing, is not held against an upstream.
    """
    kind = content_type.partition(";")[0].strip().lower()
    vague = kind in ("", "text/plain", "application/octet-stream", "binary/octet-stream")
    if vague or kind == ("text/event-stream" if stream else "application/json"):
        return None
    if not stream and (kind == "text/json" or kind.endswith("+json")):
        return None
    found = kind[:64] if kind.isprintable() else "something else"
    wanted = "events" if stream else "JSON"
    return _bad(origin, f"answered with {found} instead of {wanted}")


def read_answer(body: bytes, api: Api, origin: Origin, *, empty_is_fine: bool) -> Answer:
    """Return what a whole, unstreamed answer of status 200 is.

    Args:
        body: the document.
        api: the interface that was asked.
        origin: the upstream.
        empty_is_fine: as `may_be_empty` says of the request.
    """
    document = parse_object(body)
    if document is None:
        what = "nothing" if not body.strip() else "what is not a JSON object, or half of one"
        return Answer(_bad(origin, f"answered with {what}"))
    usage = usage_of(document)
    if is_error(document) or document.get("status") == "failed":
        return Answer(classify_error(document, origin), usage)
    parts, reasons = _parts(document, api)
    failure = None
    if parts is None:
        failure = _bad(origin, "answered with a document that is no answer")
    elif not any(parts) and not empty_is_fine and not _MAY_BE_EMPTY.intersection(reasons):
        failure = _empty(origin)
    return Answer(failure, usage, tuple(dict.fromkeys(reasons)), len(parts or ()))


def _parts(document: Document, api: Api) -> tuple[list[bool] | None, list[str]]:
    """Return for each choice whether it has content, and the finish reasons.

    None instead of choices means that the document is no answer of this API.
    """
    if api in (Api.CHAT, Api.COMPLETIONS):
        if not isinstance(document.get("choices"), list):
            return None, []
        choices = list(choices_of(document))[:MAX_CHOICES]
        return [has_content(c) for c in choices], _reasons(c.get("finish_reason") for c in choices)
    if api is Api.MESSAGES:
        blocks = document.get("content")
        if not isinstance(blocks, list):
            return None, []
        filled = any(isinstance(b, Mapping) and block_has_content(b) for b in blocks)
        return [filled], _reasons([document.get("stop_reason")])
    items = document.get("output")
    if not isinstance(items, list):
        return None, []
    details = document.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, Mapping) else None
    waits = document.get("status") in ("queued", "in_progress")  # it runs in the background
    return [waits or any(_item_has_content(i) for i in items)], _reasons([reason or "stop"])


def _item_has_content(item: Any) -> bool:
    """True for an item of Responses' output that says something."""
    if not isinstance(item, Mapping):
        return False
    if item.get("type") == "reasoning":
        return bool(item.get("summary") or item.get("content"))
    if item.get("type") != "message":
        return True  # a call of some tool
    parts = item.get("content")
    return isinstance(parts, list) and any(
        isinstance(p, Mapping) and (p.get("text") or p.get("refusal")) for p in parts
    )


def _reasons(found: Any) -> list[str]:
    reasons = [reason[:64] for reason in found if isinstance(reason, str) and reason]
    return list(dict.fromkeys(reasons))[:MAX_FINISH_REASONS]


class StreamReader:
    """Follows one stream, event by event, and says at its end what it was.

    `committed` turns True with the first event that has content. Until then the events can be kept
    back (there are few) and another SLM can answer.
    """

    __slots__ = (
        "_api",
        "_asked",
        "_choices",
        "_empty_is_fine",
        "_ended",
        "_failure",
        "_finished",
        "_origin",
        "_reasons",
        "committed",
        "usage",
    )

    def __init__(self, api: Api, origin: Origin, *, empty_is_fine: bool, choices: int = 1) -> None:
        """Create a reader; `choices` were asked for, the rest is as of `read_answer`."""
        self._api = api
        self._origin = origin
        self._empty_is_fine = empty_is_fine
        self._asked = choices
        self._choices = 0  # highest index + 1
        self._finished: set[int] = set()  # indices of choices with a finish reason
        self._reasons: dict[str, None] = {}
        self._failure: Failure | None = None
        self._ended = False
        self.committed = False
        self.usage: Usage | None = None

    def read(self, event: Event) -> EventKind:
        """Take the next event of the stream and return its kind."""
        kind, document = classify(event, self._api)
        if kind is EventKind.CONTENT:
            self.committed = True
        elif kind is EventKind.ERROR and not self._ended:
            self._failure = self._failure or classify_error(document, self._origin)
        elif kind is EventKind.END:
            self._ended = True
        if document is not None:
            self._note(document, kind)
        return kind

    @property
    def failure(self) -> Failure | None:
        """The failure that an event of the stream was, as soon as it came."""
        return self._failure

    def finish(self, *, truncated: bool) -> Answer:
        """Return what the stream was, after its last event.

        Args:
            truncated: its last bytes were no whole event (`EventScanner.truncated`).
        """
        failure, lacks_end = self._failure, False
        if failure is None and not self._ended:
            choices = max(self._asked, self._choices)
            lacks_end = len(self._finished) >= choices and not truncated
            lacks_end = lacks_end and self._api is not Api.RESPONSES
            if not lacks_end:
                failure = _bad(self._origin, "ended its stream in the middle of an answer")
        reasons = tuple(self._reasons)
        may_be = self._empty_is_fine or bool(_MAY_BE_EMPTY.intersection(reasons))
        if failure is None and not self.committed and not may_be:
            failure = _empty(self._origin)
        return Answer(failure, self.usage, reasons, self._choices, lacks_end and failure is None)

    def _note(self, document: Document, kind: EventKind) -> None:
        usage = usage_of(document)
        if usage is not None:
            self.usage = usage if self.usage is None else self.usage.merged(usage)
        if self._api in (Api.CHAT, Api.COMPLETIONS):
            for choice in choices_of(document):
                self._note_choice(choice.get("index", 0), choice.get("finish_reason"))
        elif self._api is Api.MESSAGES and kind is EventKind.FINISH:
            self._note_choice(0, document["delta"].get("stop_reason"))
        elif self._api is Api.RESPONSES and kind is EventKind.END:
            response = document.get("response")
            if isinstance(response, Mapping):
                parts, reasons = _parts(response, self._api)
                self.committed = self.committed or any(parts or ())
                self._note_choice(0, reasons[0] if reasons else None)

    def _note_choice(self, index: Any, reason: Any) -> None:
        if type(index) is not int or not 0 <= index < MAX_CHOICES:
            return
        self._choices = max(self._choices, index + 1)
        if isinstance(reason, str) and reason:
            self._finished.add(index)
            if len(self._reasons) < MAX_FINISH_REASONS:
                self._reasons[reason[:64]] = None


def _bad(origin: Origin, what: str) -> Failure:
    return Failure(FailureKind.BAD_ANSWER, f"{origin.slm_id!r} {what}")


def _empty(origin: Origin) -> Failure:
    return Failure(FailureKind.EMPTY_ANSWER, f"{origin.slm_id!r} gave an empty answer")
