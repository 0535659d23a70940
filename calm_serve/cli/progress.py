"""A progress bar on stderr, where stderr is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

WIDTH = 24  # characters of the bar
PERIOD_S = 0.1  # least time between two drawings


class ProgressBar:
    """`label [####----] 12/48, 0:07 left`; nothing is written to a stream that is no terminal.

    `clock` counts seconds.
    """

    def __init__(
        self,
        label: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._clock = label, clock
        self._stream = sys.stderr if stream is None else stream
        self._started: tuple[float, int] | None = None  # when, and what was done before
        self._drawn_at = float("-inf")

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps are done; the last one ends the line."""
        if not self._stream.isatty():
            return
        now = self._clock()
        if self._started is None:
            self._started = now, done
        if done < total and now - self._drawn_at < PERIOD_S:
            return
        self._drawn_at = now
        filled = WIDTH * done // max(total, 1)
        bar = "#" * filled + "-" * (WIDTH - filled)
        end = "\n" if done >= total else ""
        left = self._left(now, done, total)
        self._stream.write(f"\r\x1b[K{self._label} [{bar}] {done:,}/{total:,}{left}{end}")
        self._stream.flush()

    def _left(self, now: float, done: int, total: int) -> str:
        assert self._started is not None
        since, before = self._started
        if done <= before or done >= total:
            return ""
        seconds = round((now - since) * (total - done) / (done - before))
        hours, minutes = divmod(seconds // 60, 60)
        clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
        return f", {clock}:{seconds % 60:02} left"
