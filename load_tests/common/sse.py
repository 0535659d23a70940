"""Arrival times of a streamed answer's events, from the received data of an HTTP response."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

# A delta with text. A chat's first event has the role and no text, its last only the usage.
_TEXT = re.compile(rb'"content":\s*"(?!")')
_TOKENS = re.compile(rb'"(completion|prompt)_tokens":\s*(\d+)')
_SLM = re.compile(rb"\r\nx-calm-model:\s*([^\r]*)", re.IGNORECASE)
_REASON = re.compile(rb"\r\nx-calm-reason:\s*([^\r]*)", re.IGNORECASE)

Piece = tuple[float, bytes]  # clock in seconds, data


@dataclass(slots=True)
class Raw:
    """One exchange as received; `due` and the pieces' times are of the same clock."""

    due: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    error: str = "not sent"


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one exchange; times in seconds from when the request was due.

    `ttft_s` and `gaps_s` are of events with text. An answer that is not streamed has no gaps, and
    its end as `ttft_s`. `slm` and `reason` are calm_serve's headers, empty for other servers.
    """

    error: str
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    events: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    slm: str = ""
    reason: str = ""

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        return sum(self.gaps_s) / max(self.tokens - 1, 1)


def parse(raw: Raw) -> Answer:
    """The answer of one exchange; `error` names what is wrong with it, "" if nothing is."""
    if raw.error:
        return Answer(raw.error)
    data = b"".join(piece for _, piece in raw.pieces)
    head, _, rest = data.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode()
    if status != "200":
        return Answer(f"status {status}")
    offset = len(data) - len(rest)
    if b"\r\ntransfer-encoding: chunked" in head.lower():
        body, places = dechunk(rest)
    else:
        body, places = rest, [(len(rest), len(rest))]
    counts = {kind: int(number) for kind, number in _TOKENS.findall(body)}
    stops = list(accumulate(len(piece) for _, piece in raw.pieces))

    def arrived(place: int) -> float:
        """Time at which the body was received up to `place` (exclusive)."""
        end, raw_end = places[bisect_left(places, (place, 0))]
        return raw.pieces[bisect_left(stops, offset + raw_end - (end - place))][0] - raw.due

    streamed = b"text/event-stream" in head.lower()
    times = [arrived(end) for end in text_events(body)] if streamed else []
    e2e_s = raw.pieces[-1][0] - raw.due
    error = ""
    if b"completion" not in counts:
        error = "no usage"
    elif streamed and (b"[DONE]" not in body or not times):
        error = "cut"
    return Answer(
        error,
        times[0] if times else e2e_s,
        e2e_s,
        tuple(b - a for a, b in pairwise(times)),
        len(times),
        counts.get(b"completion", 0),
        counts.get(b"prompt", 0),
        _header(_SLM, head),
        _header(_REASON, head),
    )


def dechunk(data: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """The body of a chunked response, and each chunk's end in the body and in `data`."""
    parts: list[bytes] = []
    places: list[tuple[int, int]] = []
    at = length = 0
    while (line := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line].split(b";")[0], 16)
        if not size:
            break
        at = line + 2 + size
        length += size
        parts.append(data[line + 2 : at])
        places.append((length, at))
        at += 2
    return b"".join(parts), places


def text_events(body: bytes) -> Sequence[int]:
    """The position in the body at which each event with text ends."""
    found, start = [], 0
    while (end := body.find(b"\n\n", start)) >= 0:
        if _TEXT.search(body, start, end):
            found.append(end + 2)
        start = end + 2
    return found


def _header(pattern: re.Pattern[bytes], head: bytes) -> str:
    found = pattern.search(head)
    return found[1].decode() if found else ""
