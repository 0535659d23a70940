"""The last event of a replica's stream, which is the router's and not the client's."""

from __future__ import annotations

import contextlib

from calm_serve.errors import KnowledgeError
from calm_serve.protocol.answers import ANSWER_END, AnswerEnd
from deployments.wire import END_EVENT


class EndScanner:
    """Takes the replica's last event off a stream, whatever its chunks are.

    A chunk is passed on at once unless its end may be the beginning of that event.
    """

    def __init__(self) -> None:
        self._held = b""
        self._event: list[bytes] = []  # the last event, from its beginning on
        self._at_line_start = True

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes that belong to the answer."""
        if self._event:
            self._event.append(chunk)
            return b""
        data = self._held + chunk if self._held else chunk
        self._held = b""
        begin = self._find(data)
        if begin >= 0:
            self._event.append(data[begin:])
            return data[:begin]
        if not data.endswith(b"\n"):
            cut = data.rfind(b"\n") + 1
            tail = data[cut:]
            if (cut or self._at_line_start) and END_EVENT.startswith(tail[: len(END_EVENT)]):
                self._held, data = tail, data[:cut]
        if data:
            self._at_line_start = data.endswith(b"\n")
        return data

    def end(self) -> AnswerEnd | None:
        """Return the last event; None when the stream broke off before it was complete."""
        event = b"".join(self._event)
        if not event.endswith(b"\n\n"):
            return None
        with contextlib.suppress(KnowledgeError):
            return ANSWER_END.decode(event[len(END_EVENT) :].strip())
        return None

    def _find(self, data: bytes) -> int:
        begin = data.find(END_EVENT)
        while begin >= 0:
            if data[begin - 1 : begin] == b"\n" if begin else self._at_line_start:
                return begin
            begin = data.find(END_EVENT, begin + 1)
        return -1
