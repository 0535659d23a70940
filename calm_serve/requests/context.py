"""A request becomes a `RoutingContext`: plain fields, no prompt text.

No tokenizer. The time does not grow with the prompt, except for safety patterns, which search the
whole text (the body's size is limited). Markers see its first and last `SCAN_CHARS` characters, the
prefix chain its first `MAX_BLOCKS` blocks.
"""

from __future__ import annotations

import re
from zlib import crc32

from calm_serve.config import Fleet
from calm_serve.requests.features import FOCUS_CHARS
from calm_serve.requests.overrides import Overrides
from calm_serve.requests.parsed import ROLE_END, START, ParsedRequest
from calm_serve.requests.patterns import Pattern, Patterns, plain
from calm_serve.requests.tokens import ends, letter_runs
from calm_serve.types import RoutingContext, ServiceLevel, Task

SCAN_CHARS = 1024  # at each end of the text
LANGUAGE_CHARS = 256  # of the last user message
BLOCK_CHARS = 128  # about 32 tokens; bytes for text beyond ASCII
MAX_BLOCKS = 64
CHARS_PER_TOKEN = 4.0  # estimate for English; the engine counts exactly

_CODE = Pattern(
    r"```|^\s*(?:def |class |import |#include|function |SELECT )|Traceback \(most recent"
    r"|error: |\w\(\)|=>|::|;\s*$|\{\s*$",
    ignore_case=False,
)
# A few frequent words distinguish these languages in a sentence; every other language is "und".
# Words that are English too ("was", "as", "come", "per", "die") are left out of the other lists.
_FREQUENT = {
    "en": "the a an is are of to in and what how for with on my me i you it as was by which",
    "de": "der das und ist ein eine nicht ich zu mit auf wie für den",
    "fr": "le la les et est un une des du je pour dans que qui avec sur",
    "es": "el la los las y es un una de que en por con para como mi",
    "it": "il lo la gli e di un una che con sono non mi",
    "pt": "o a os e um uma de que em por com para como não meu",
}
_STOPWORDS = {code: frozenset(words.split()) for code, words in _FREQUENT.items()}
_ANY_STOPWORD = frozenset[str]().union(*_STOPWORDS.values())
# Patterns see messages as lines, without roles; `^` is the start of a message or of a line.
_MESSAGE_START = re.compile(rf"{START}\w+{ROLE_END}")


class ContextBuilder:
    """Builds RoutingContexts for one fleet; its patterns are compiled once."""

    def __init__(self, fleet: Fleet, embedding_space: str = "") -> None:
        """`embedding_space` is the key of the vector space for requests that name no SLM."""
        self._embedding_space = embedding_space
        self._markers = Patterns(dict(sorted(fleet.markers.items())))
        self._safety = [(s, Pattern(s.pattern)) for s in fleet.safety]

    def build(
        self, request: ParsedRequest, overrides: Overrides, request_id: str
    ) -> RoutingContext:
        """Return the context without features; only safety patterns cost more for long prompts."""
        whole = request.text
        is_plain = plain(whole)
        # The whole text, because a secret may be in the middle; the body's size limit bounds it.
        lines = _lines(whole) if self._safety else ""
        short = self._safety and len(whole) <= 2 * SCAN_CHARS
        scan = lines if short else _lines(ends(whole, SCAN_CHARS))
        safety = next((s for s, p in self._safety if p.occurs(lines, is_plain)), None)
        chain = prefix_chain(request.prefix or whole, request.prefix_seed)
        session = overrides.session_id
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
            language=detect_language(request.last_user[:LANGUAGE_CHARS]),
            has_code=_CODE.occurs(ends(request.last_user, FOCUS_CHARS), is_plain),
            safety_class=safety.name if safety else "none",
            markers=tuple(self._markers.found(scan, is_plain)),
            session_key=f"{_hash(session):08x}" if session else "",
            prefix_family=f"{chain[min(1, len(chain) - 1)]:08x}",
            prefix_chain=chain,
            slo=ServiceLevel(overrides.slo_ttft_ms, overrides.slo_tpot_ms, overrides.deadline_s),
            local_only=overrides.local_only or bool(safety and safety.local_only),
            quality_floor=overrides.quality_floor,
        )


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


def detect_language(text: str) -> str:
    """Return an ISO 639-1 code by counting frequent words; "und" when undecided.

    >>> detect_language("Wie ist das Wetter in Berlin?")
    'de'
    """
    words = letter_runs(text)
    hits = _ANY_STOPWORD.intersection(words)
    best, best_hits = "und", 0
    for code, stopwords in _STOPWORDS.items():
        count = len(hits & stopwords)
        if count > best_hits:
            best, best_hits = code, count
    # One frequent word is weak evidence, because names and commands contain such words. A wrong
    # language could exclude every SLM, so ASCII text counts as English unless two words indicate
    # another language.
    return "en" if best_hits < 2 and words and text.isascii() else best


def _hash(text: str) -> int:
    # A lone surrogate is legal in a Python string, so it must not make a request fail.
    return crc32(text.encode("utf-8", "surrogatepass"))


def _lines(text: str) -> str:
    return _MESSAGE_START.sub("\n", text).lstrip("\n")
