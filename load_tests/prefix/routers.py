"""Ray's own policies as served baselines.

They are subclasses of `ReplicaRouter`, which reports replicas to its process; with Ray's classes
alone the fleet would not become ready. Serve takes the shortest queue of the first group that has
room, so a group of two random replicas makes the power of two choices.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RunningReplica

from deployments.router.request_router import ReplicaRouter


class PowerOfTwo(ReplicaRouter):
    """The shorter queue of two random replicas: Serve's default."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return one group of two random replicas."""
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
        """Return a group per replica, starting with the next one."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        ordered = sorted(candidate_replicas, key=lambda r: r.replica_id.unique_id)
        at = self._chosen % len(ordered)
        self._chosen += 1
        return [[r] for r in (*ordered[at:], *ordered[:at])]
