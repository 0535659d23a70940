"""Ray's own rules as served baselines.

They are subclasses of `ReplicaRouter`, which tells the process about replicas; with Ray's classes
alone, the fleet would never be ready. Serve takes the shortest queue of the first group that has
room, which is what makes two drawn replicas the power of two choices.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RunningReplica

from deployments.router.request_router import ReplicaRouter


class PowerOfTwo(ReplicaRouter):
    """Two replicas at random, then the shorter queue: Serve's default."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return a group of two."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [self._random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


class RoundRobin(ReplicaRouter):
    """One after the other, as in Serve's RoundRobinRouter."""

    _chosen = 0

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return every replica, the next one first."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        ordered = sorted(candidate_replicas, key=lambda r: r.replica_id.unique_id)
        at = self._chosen % len(ordered)
        self._chosen += 1
        return [[r] for r in (*ordered[at:], *ordered[:at])]
