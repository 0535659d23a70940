"""What the request router of an SLM's handle offers to the rest of the router process."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from deployments.wire import Hints, ReplicaAddress


@dataclass(frozen=True, slots=True)
class ChosenReplica:
    """The replica that gets a request."""

    replica_id: str
    address: ReplicaAddress


class ReplicaChooser(Protocol):
    """Chooses replicas of one SLM, and is told what happens to the requests."""

    def choose(self, hints: Hints, tried: Container[str] = ()) -> ChosenReplica | None:
        """Return the best replica that is not in `tried`; None when there is no other one."""

    def sent(self, replica_id: str, hints: Hints) -> None:
        """Count a request that is on its way to a replica."""

    def answered(
        self, replica_id: str, hints: Hints, *, accepted: bool, ongoing: int | None
    ) -> None:
        """Take a replica's first reaction to a request; `ongoing` is its count of requests."""

    def finished(self, replica_id: str) -> None:
        """Count a request that is over, however it ended."""
