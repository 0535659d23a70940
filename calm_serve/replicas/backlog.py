"""The prompts that a replica has yet to compute, as one process can know them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

MAX_WAITING = 1024  # own requests that are predicted to wait; the oldest are dropped

REPORT_DELAY_S = 1.0
"""A polled report may be this old: own requests sent since then may be missing from it."""

TOLERANCE_RATIO = 0.3
"""Difference between report and own account that counts as none, in mean requests."""


class _Own(NamedTuple):
    start_s: float  # predicted
    work_s: float
    sent_s: float
    tokens: float  # of the whole prompt


class MeanPrompt(NamedTuple):
    """The mean request of an SLM, for those of which nothing is known."""

    tokens: float  # of the whole prompt
    prefill_s: float  # of the uncached tokens


class Backlog:
    """A virtual queue: own requests add their prefill seconds, time drains it, reports correct it.

    Times are monotonic seconds. Bounded; belongs to whoever holds the estimator's lock.
    """

    __slots__ = ("_last_s", "_own", "_ready_at_s")

    def __init__(self) -> None:
        self._ready_at_s = 0.0
        self._last_s = 0.0  # of the last own request
        self._own: deque[_Own] = deque(maxlen=MAX_WAITING)

    def wait_s(self, now_s: float) -> float:
        """Seconds until the work ahead of a new request is done."""
        return max(self._ready_at_s - now_s, 0.0)

    def add(self, work_s: float, tokens: float, now_s: float) -> None:
        """Count an own request: its prefill seconds and the tokens of its whole prompt."""
        start_s = max(self._ready_at_s, now_s)
        self._ready_at_s = start_s + work_s
        self._last_s = work_s
        if start_s > now_s:
            self._own.append(_Own(start_s, work_s, now_s, tokens))

    def remove(self, work_s: float) -> None:
        """Take back an own request of so many seconds, which the replica did not accept."""
        self._ready_at_s -= work_s
        for i in range(len(self._own) - 1, -1, -1):
            if self._own[i].work_s == work_s:
                del self._own[i]
                break

    def reported(
        self,
        waiting: int,
        now_s: float,
        mean: MeanPrompt,
        *,
        delay_s: float = 0.0,
        lengths: Sequence[int] = (),
    ) -> None:
        """Take a replica's count of waiting requests, at most `delay_s` old.

        `lengths` are the tokens of the last prompts that it accepted, oldest first. An engine
        starts prompts in the order in which they came, so the last ones are those that wait. What
        is not this process's own is work of others.
        """
        own = self._own
        while own and own[0].start_s <= now_s:
            own.popleft()
        before_s = self.wait_s(now_s)
        certain = sum(one.sent_s <= now_s - delay_s for one in own)
        if waiting > len(own):
            others_s = self._others_s(waiting, mean, lengths)
            # Half of the one that is computed at present.
            after_s = sum(one.work_s for one in own) + others_s + 0.5 * mean.prefill_s
        elif waiting < certain or not own:
            # More has started than predicted: what is left are the last ones, and one at work.
            left = list(own)[certain - waiting :] if own else []
            at_work_s = max(self._last_s, mean.prefill_s)
            after_s = min(before_s, sum(one.work_s for one in left) + at_work_s)
        else:
            return
        later_s = after_s - before_s
        if abs(later_s) < TOLERANCE_RATIO * mean.prefill_s:
            return
        self._ready_at_s = now_s + after_s
        shifted = (one._replace(start_s=one.start_s + later_s) for one in own)
        self._own = deque((one for one in shifted if one.start_s > now_s), MAX_WAITING)

    def _others_s(self, waiting: int, mean: MeanPrompt, lengths: Sequence[int]) -> float:
        known = lengths[-waiting:]
        tokens = sum(known) + (waiting - len(known)) * mean.tokens
        others = max(tokens - sum(one.tokens for one in self._own), 0.0)
        if not known:
            others = (waiting - len(self._own)) * mean.tokens
        return others / mean.tokens * mean.prefill_s
