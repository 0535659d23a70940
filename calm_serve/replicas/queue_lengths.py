"""How many requests each replica of an SLM has, as one process can know it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field

REPORT_LIFETIME_S = 10.0
"""Seconds for which a replica's report counts; Ray Serve keeps its own queue lengths as long."""

MAX_UNANSWERED = 4096
"""Sent requests per replica whose acceptance is awaited; the oldest are dropped beyond."""


@dataclass(slots=True)
class _Replica:
    own: int = 0  # requests of this process in the replica, or on the way to it
    sent: int = 0  # in this process's life
    finished: int = 0
    others: int = 0  # requests of other processes, by the replica's last report
    reported_at_s: float = -float("inf")
    # For each request that the replica has not yet answered: when it was sent, and `finished` then.
    unanswered: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=MAX_UNANSWERED)
    )


class QueueLengths:
    """Own requests exactly, those of other processes by the replicas' reports.

    A report is older than what this process knows: a request that it counts may have finished
    while the report travelled. Taken as it is, it would leave an idle replica with requests until
    the report expires. So every own request that was in the replica at any time between question
    and report is taken off before the rest is ascribed to other processes. Belongs to one thread,
    except `of`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start without replicas; `clock` returns monotonic seconds."""
        self._clock = clock
        self._replicas: dict[str, _Replica] = {}

    def sent(self, replica_id: str) -> None:
        """Count a request as on the way to the replica."""
        replica = self._replicas.setdefault(replica_id, _Replica())
        replica.unanswered.append((self._clock(), replica.finished))
        replica.own += 1
        replica.sent += 1

    def answered(self, replica_id: str, requests: int) -> None:
        """Take the length that comes with the acceptance or refusal of the oldest sent request."""
        replica = self._replicas.setdefault(replica_id, _Replica())
        asked, unanswered = replica.finished, replica.unanswered
        # Requests that failed or were cancelled before an answer are still in the queue.
        oldest_s = self._clock() - REPORT_LIFETIME_S
        while unanswered and unanswered[0][0] < oldest_s:
            unanswered.popleft()
        if unanswered:
            asked = unanswered.popleft()[1]
        self.reported(replica_id, requests, asked)

    def finished(self, replica_id: str) -> None:
        """Count one request of this process as over, however it ended."""
        replica = self._replicas.get(replica_id)
        if replica is None or replica.own == 0:
            return
        replica.own -= 1
        replica.finished += 1

    def asked(self, replica_id: str) -> int:
        """Return what `reported` needs to know of the time at which a replica was asked."""
        replica = self._replicas.get(replica_id)
        return 0 if replica is None else replica.finished

    def reported(self, replica_id: str, requests: int, asked: int) -> None:
        """Take a replica's own count of its requests; `asked` is from before the question."""
        replica = self._replicas.setdefault(replica_id, _Replica())
        replica.others = max(0, requests - (replica.sent - asked))
        replica.reported_at_s = self._clock()

    def of(self, replica_id: str) -> int | None:
        """Return the requests in the replica; None without own requests and a recent report."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return None
        if self._clock() - replica.reported_at_s <= REPORT_LIFETIME_S:
            return replica.own + replica.others
        return replica.own or None

    def forget(self, replica_id: str) -> None:
        """Drop a replica's report, for example because it cannot be reached."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.reported_at_s = -float("inf")
            replica.unanswered.clear()

    def retain(self, replica_ids: Container[str]) -> None:
        """Drop replicas that are gone."""
        self._replicas = {r: c for r, c in self._replicas.items() if r in replica_ids}
