"""Goal history: changes of the operator's goals with author and time, kept over a restart.

A change at run time survives restarts and redeployments. A deployment replaces it only when its
configured goals differ from those of the last deployment, because the operator has then edited the
configuration.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from pydantic import ValidationError

from calm_serve.config import Goals, first_error
from calm_serve.protocol.topics import GoalChange

CONFIGURATION = "configuration"  # `by` of a change that a deployment made
MAX_LABEL_CHARS = 64  # of `by`, which a client states
MAX_HISTORY = 1000  # changes in one answer
_log = logging.getLogger(__name__)


class GoalLog(Protocol):
    """The store, as the history uses it; a write is durable when it returns."""

    def add_goal_change(self, change: GoalChange, configured: str | None) -> GoalChange:
        """Append a change, with the configured goals behind it; return it with its revision."""
        ...

    def goal_changes(self, limit: int) -> list[GoalChange]:
        """The newest changes first."""
        ...

    def configured_goals(self) -> str | None:
        """The last `configured` that `add_goal_change` stored."""
        ...


class GoalHistory:
    """Goals of one application, durable and published.

    Args:
        log: the store; its methods block.
        publish: publishes a change to the routers, on the caller's event loop.
        in_thread: runs a blocking call, one after another.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        log: GoalLog,
        publish: Callable[[GoalChange], None],
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        clock: Callable[[], float],
    ) -> None:
        """Load and publish the goals that were last set, if any (blocks; once)."""
        self._log, self._publish = log, publish
        self._in_thread, self._clock = in_thread, clock
        self._newest: GoalChange | None = next(iter(log.goal_changes(1)), None)
        self._publish_newest()

    async def configure(self, goals: Goals) -> None:
        """Take a deployment's goals; they apply if they differ from the last deployment's."""
        new = _plain(goals)
        configured = json.dumps(new, sort_keys=True)

        def write() -> None:
            if self._log.configured_goals() != configured or not self._readable():
                self._write(new, CONFIGURATION, configured)

        await self._in_thread(write)
        self._publish_newest()

    async def set(self, goals: Goals, by: str) -> GoalChange:
        """Replace the goals; durable when this returns, and published to every router."""
        label = "".join(c if c.isprintable() else "?" for c in by)[:MAX_LABEL_CHARS]
        change: GoalChange = await self._in_thread(lambda: self._write(_plain(goals), label, None))
        self._publish_newest()
        return change

    async def history(self, limit: int) -> tuple[GoalChange, ...]:
        """The newest changes first, at most `limit` and MAX_HISTORY."""
        limit = min(limit, MAX_HISTORY)
        found: list[GoalChange] = await self._in_thread(lambda: self._log.goal_changes(limit))
        return tuple(found)

    def _write(self, new: dict[str, Any], by: str, configured: str | None) -> GoalChange:
        old = self._newest.new if self._newest else None
        change = GoalChange(self._clock(), by, old, new)
        self._newest = self._log.add_goal_change(change, configured)
        return self._newest

    def _readable(self) -> bool:
        """Whether this version of the program accepts the newest goals."""
        if self._newest is None:
            return False
        try:
            Goals.model_validate(self._newest.new)
        except ValidationError as error:
            _log.error("%s; this version does not accept them", first_error("stored goals", error))
            return False
        return True

    def _publish_newest(self) -> None:
        # Always the newest: two concurrent changes must not be published in reverse order.
        if self._readable() and self._newest is not None:
            self._publish(self._newest)


def _plain(goals: Goals) -> dict[str, Any]:
    # Without defaults: a new field in a later version must not look like an edited configuration.
    return goals.model_dump(mode="json", exclude_defaults=True)
