"""A request becomes a `RoutingContext`: plain fields, no prompt text.

No tokenizer. The time does not grow with the prompt, except for safety patterns, which search the
whole text (the body's size is limited), and for markers that read more than the last message.
Markers see the first and last `SCAN_CHARS` characters of what they read, the prefix chain the first
`MAX_BLOCKS` blocks of the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from zlib import crc32

from calm_serve.config import Fleet
from calm_serve.requests.features import FOCUS_CHARS
from calm_serve.requests.languages import load_detector, needs_detector
from calm_serve.requests.overrides import Overrides
from calm_serve.requests.parsed import ROLE_END, START, ParsedRequest
from calm_serve.requests.patterns import Pattern, Patterns, plain
from calm_serve.requests.tokens import ends
from calm_serve.requests.transcript import SYSTEM_ROLES, messages_of
from calm_serve.types import UNKNOWN_LANGUAGE, RoutingContext, ServiceLevel, Task

SCAN_CHARS = 1024  # at each end of the text
BLOCK_CHARS = 128  # about 32 tokens; bytes for text beyond ASCII
MAX_BLOCKS = 64
CHARS_PER_TOKEN = 4.0  # estimate for English; the engine counts exactly

_CODE = Pattern(
    r"```|^\s*(?:def |class |import |#include|function |SELECT )|Traceback \(most recent"
    r"|error: |\w\(\)|=>|::|;\s*$|\{\s*$",
    ignore_case=False,
)
# Patterns see messages as lines, without roles; `^` is the start of a message or of a line.
_MESSAGE_START = re.compile(rf"{START}\w+{ROLE_END}")


class ContextBuilder:
    """Builds RoutingContexts for one fleet; its patterns are compiled once."""

    def __init__(
        self,
        fleet: Fleet,
        embedding_space: str = "",
        find_slm: Callable[[int, str], str] = lambda _key, _session: "",
    ) -> None:
        """Blocks for a second when this is the process's first fleet that needs languages.

        Args:
            fleet: its patterns are compiled.
            embedding_space: key of the vector space for requests that name no SLM.
            find_slm: the SLM that answered the conversation of a key, or of a session; "" if none
                is known.
        """
        self._find_slm = find_slm
        self._embedding_space = embedding_space
        self._languages = load_detector() if needs_detector(fleet) else None
        scopes: dict[str, dict[str, str]] = {}
        for name, marker in sorted(fleet.markers.items()):
            scopes.setdefault(marker.scope, {})[name] = marker.pattern
        self._markers = {scope: Patterns(named) for scope, named in scopes.items()}
        self._safety = [(s, Pattern(s.pattern)) for s in fleet.safety]

    def build(
        self, request: ParsedRequest, overrides: Overrides, request_id: str
    ) -> RoutingContext:
        """Return the context without features; only safety patterns cost more for long prompts."""
        whole = request.text
        is_plain = plain(whole)
        safety_class, is_sensitive = self._search_safety(request, is_plain)
        chain = prefix_chain(request.prefix or whole, request.prefix_seed)
        session_key = f"{_hash(overrides.session_id):08x}" if overrides.session_id else ""
        markers, follows_up = self._find_markers(request, is_plain)
        previous = self._find_slm(request.parent_key, session_key) if request.parent_key else ""
        language, language_ratio = self._detect(request)
        tokens, sequence_tokens = _count_tokens(request)
        is_open = request.task is Task.EMBED and request.model == "auto"
        return RoutingContext(
            request_id=request_id,
            task=request.task,
            tokenizer_only=request.tokenizer_only,
            route=request.route,
            requested_model=request.model,
            prompt_chars=len(whole) or round(tokens * CHARS_PER_TOKEN),
            prompt_tokens=tokens,
            sequence_tokens=sequence_tokens,
            is_token_ids=request.is_token_ids,
            truncates_prompt=request.truncate_tokens == -1,
            max_output_tokens=request.max_output_tokens,
            output_shape=request.output_shape,
            needs=request.needs,
            ignored_fields=request.ignored_fields,
            embedding_space=self._embedding_space if is_open else "",
            turns=request.turns,
            stream=request.stream,
            language=language,
            language_ratio=language_ratio,
            has_code=_CODE.occurs(ends(request.last_user, FOCUS_CHARS), is_plain),
            safety_class=safety_class,
            markers=markers,
            session_key=session_key,
            conversation_key=request.conversation_key,
            previous_slm=previous,
            history_tokens=round(request.history_chars / CHARS_PER_TOKEN),
            tool_loop=request.ends_in_tool_results,
            follows_up=follows_up,
            prefix_family=f"{chain[min(1, len(chain) - 1)]:08x}",
            prefix_chain=chain,
            slo=ServiceLevel(overrides.slo_ttft_ms, overrides.slo_tpot_ms, overrides.deadline_s),
            local_only=overrides.local_only or is_sensitive,
            quality_floor=overrides.quality_floor,
        )

    def _detect(self, request: ParsedRequest) -> tuple[str, float]:
        if self._languages is None:
            return UNKNOWN_LANGUAGE, 0.0
        return self._languages.detect(request.last_user)

    def _find_markers(self, request: ParsedRequest, is_plain: bool) -> tuple[tuple[str, ...], bool]:
        """Return the markers, and whether the user's last message only continues one before it.

        That message names no marker itself; where it continues another one, that one names them.
        """
        found: list[str] = []
        follows_up = bool(request.followed_user)
        for scope, patterns in self._markers.items():
            scan = ends(_text_in_scope(request, scope), SCAN_CHARS)
            named = patterns.found(scan, is_plain)
            if scope == "last_user" and follows_up:
                follows_up = not named
                named = named or patterns.found(ends(request.followed_user, SCAN_CHARS), is_plain)
            found += named
        return tuple(sorted(found)), follows_up

    def _search_safety(self, request: ParsedRequest, is_plain: bool) -> tuple[str, bool]:
        """Return the class of the first pattern that pins, "none" without one; and `local_only`."""
        if not self._safety:
            return "none", False
        # The whole text, because a secret may be in the middle; the body's size limit bounds it.
        lines, conversation, local_only = _lines(request.text), None, False
        for safety, pattern in self._safety:
            if not pattern.occurs(lines, is_plain):
                continue
            local_only = local_only or safety.local_only
            if request.system_chars and safety.pins == "conversation":
                if conversation is None:
                    conversation = _joined(request.text, lambda role: role not in SYSTEM_ROLES)
                if not pattern.occurs(conversation, is_plain):
                    continue
            return safety.name, local_only
        return "none", local_only


def _text_in_scope(request: ParsedRequest, scope: str) -> str:
    """Return what markers of this scope (`config.Marker`) read, without roles."""
    if scope == "all":
        return _lines(ends(request.text, SCAN_CHARS))
    if scope == "user":
        return _joined(request.text, lambda role: role == "user")
    # Without a message of the user, `last_user` is whatever came last.
    return request.last_user if request.turns else ""


def _joined(text: str, is_read: Callable[[str], bool]) -> str:
    return "\n".join(content for role, content in messages_of(text) if is_read(role))


def _count_tokens(request: ParsedRequest) -> tuple[int, int]:
    """Return tokens of all prompts, and of the longest of several; 0 for the second with one.

    They are estimates, unless the prompts are token ids.
    """
    together = request.input_tokens
    if together is None:
        together = round(len(request.text) / CHARS_PER_TOKEN)
    longest = request.sequence_tokens or 0
    if request.sequence_chars is not None:
        longest = max(1, round(request.sequence_chars / CHARS_PER_TOKEN))
    limit = request.truncate_tokens
    if limit is not None and limit >= 0:
        together, longest = min(together, limit * request.choices), min(longest, limit)
    return max(1, together), longest


def prefix_chain(text: str, seed: int = 0) -> tuple[int, ...]:
    """Return chained CRC-32 values of the first blocks of `text`, which starts after `seed`.

    Equal prefixes with equal seeds give equal starts of the chain. The last, partial block is
    included, so that a short prompt has a family too. CRC is the same in every process (Python's
    hash is not), so routers agree without communication.

    >>> long = "You are a helpful assistant. " * 10
    >>> prefix_chain(long + "one")[0] == prefix_chain(long + "two")[0]
    True
    """
    size = BLOCK_CHARS * MAX_BLOCKS
    data = text[:size].encode("utf-8", "surrogatepass")[:size]  # a character is 1 to 4 bytes
    value = seed
    chain = [
        value := crc32(data[start : start + BLOCK_CHARS], value)
        for start in range(0, len(data), BLOCK_CHARS)
    ]
    return tuple(chain) or (seed,)


def _hash(text: str) -> int:
    # A lone surrogate is legal in a Python string, so it must not make a request fail.
    return crc32(text.encode("utf-8", "surrogatepass"))


def _lines(text: str) -> str:
    return _MESSAGE_START.sub("\n", text).lstrip("\n")
