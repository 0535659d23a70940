"""Server-sent events: cuts a stream of bytes into events, in bounded memory.

An event keeps its raw bytes, so that a stream is forwarded byte for byte. The raw bytes of all
events of a stream, joined, are the stream.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

# Logprobs of a whole reasoning block or an image in one event are below 1 MiB; above 4 MiB it is
# no stream of events.
MAX_EVENT_BYTES = 4 << 20

_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")
# Atomic groups: a lone CR LF must not match as two line ends.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LONGEST_BLANK_LINE = 4  # bytes
_DATA, _NAME = b"data: ", b"event: "


class EventTooLargeError(ValueError):
    """An event is larger than the scanner's bound; the rest of the stream cannot be read."""


class Event(NamedTuple):
    """One event: its bytes as they came, and its fields."""

    raw: bytes  # with the blank line that ends it
    data: bytes | None  # the data lines, joined by "\n"; None: a comment, a keepalive
    name: bytes = b""  # of the field `event`


class EventScanner:
    """Gives the events of one stream, however its bytes are split into chunks."""

    __slots__ = ("_buffer", "_carriage_returns", "_max", "_scanned", "_started", "_too_large")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._buffer = bytearray()  # an event whose end has not come
        self._scanned = 0  # bytes of the buffer in which no blank line begins
        self._carriage_returns = False
        self._started = False
        self._too_large = False

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that `chunk` completes; they hold at most what came so far.

        Raises EventTooLargeError once an event is above the bound. The events before it have been
        returned by then, so that the error may come one call late.
        """
        self._check_size()
        # What servers send: one event in one chunk.
        if not self._buffer and len(chunk) <= self._max and not self._carriage_returns:
            end = chunk.find(b"\n\n")
            if 0 <= end == len(chunk) - 2 and b"\r" not in chunk:
                return [self._parse(chunk)]
        self._carriage_returns = self._carriage_returns or b"\r" in chunk
        self._buffer += chunk
        return self._cut()

    def finish(self) -> list[Event]:
        """Return what is left as an event if it is whole but for its blank line, which is added.

        Without it a client would drop an unended `data: [DONE]`. Half an event is not returned;
        `truncated` tells. Raises EventTooLargeError as `feed`.
        """
        self._check_size()
        rest = bytes(self._buffer)
        event = self._parse(rest)
        if not rest or not _is_whole(event.data):
            return []
        self._buffer.clear()
        if not _BLANK_LINE.search(rest, max(0, len(rest) - _LONGEST_BLANK_LINE)):
            # After a lone CR an LF would be of the same line end.
            rest += b"\n" if rest.endswith(b"\n") else b"\n\n"
        return [Event(rest, event.data, event.name)]

    @property
    def truncated(self) -> bool:
        """True while the stream, as far as it came, ends within an event."""
        return self._too_large or bool(self._buffer)

    def _check_size(self) -> None:
        if self._too_large:
            raise EventTooLargeError(f"an event is larger than {self._max} bytes")

    def _cut(self) -> list[Event]:
        events: list[Event] = []
        buffer, begin, start = self._buffer, 0, self._scanned
        while True:
            end = self._end(start)
            if end < 0 or end - begin > self._max:
                break
            events.append(self._parse(bytes(buffer[begin:end])))
            begin = start = end
        del buffer[:begin]
        self._too_large = len(buffer) > self._max
        if self._too_large:
            buffer.clear()
        self._scanned = max(0, len(buffer) - _LONGEST_BLANK_LINE + 1)
        return events

    def _end(self, start: int) -> int:
        """Return where the first event that ends after `start` ends; -1 when it has not ended."""
        if not self._carriage_returns:
            end = self._buffer.find(b"\n\n", start)
            return end + 2 if end >= 0 else -1
        found = _BLANK_LINE.search(self._buffer, start)
        if found is None:
            return -1
        # After a CR at the very end an LF may come that belongs to the same line end.
        undecided = found.end() == len(self._buffer) and found[0].endswith(b"\r")
        return -1 if undecided else found.end()

    def _parse(self, raw: bytes) -> Event:
        text = raw if self._started else raw.removeprefix(_BOM)
        self._started = True
        if not self._carriage_returns:
            # The usual forms: one line of data, behind a name or alone.
            start, name = 0, b""
            if text.startswith(_NAME):
                start = text.find(b"\n") + 1
                name = text[len(_NAME) : start - 1]
            if text.startswith(_DATA, start) and text.find(b"\n", start) == len(text) - 2:
                return Event(raw, text[start + len(_DATA) : -2], name)
        data: list[bytes] = []
        name = b""
        for line in _LINE_END.split(text):
            field, colon, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event" and colon:
                name = value
        return Event(raw, b"\n".join(data) if data else None, name)


def _is_whole(data: bytes | None) -> bool:
    if data is None or data.strip() == b"[DONE]":
        return True
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True
