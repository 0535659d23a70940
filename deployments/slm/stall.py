"""Stall: an engine that has requests and makes no step.

Such an engine is alive by every health check, and a request that is not streamed would wait for it
until its own time limit.
"""

from __future__ import annotations

from collections.abc import Callable

# One step is at most one chunk of prompts and a token of each running request; the slowest measured
# one takes a few seconds on a loaded CPU. Half of the default time limit of a request, so that
# another engine can still answer.
STALL_S = 60.0
# Between two checks at most so much counts: a machine that was suspended is no engine that hangs.
MAX_GAP_S = 1.0


class StallDetector:
    """Measures how long an engine has been without progress; asked several times a second.

    `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._checked_s = clock()
        self._stalled_s = 0.0
        self._steps = -1

    def stalled_s(self, requests: int, steps: int) -> float:
        """Return the seconds without a step, 0 while the engine has no requests.

        Args:
            requests: that the engine has now.
            steps: that it has made since its start.
        """
        now_s = self._clock()
        passed_s, self._checked_s = now_s - self._checked_s, now_s
        if not requests or steps != self._steps:
            self._stalled_s, self._steps = 0.0, steps
        else:
            self._stalled_s += min(passed_s, MAX_GAP_S)
        return self._stalled_s
