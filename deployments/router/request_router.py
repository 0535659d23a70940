"""Replica selection inside an SLM's handle: a thin subclass of Ray Serve's `RequestRouter`.

Serve runs it in the process that holds the handle and pickles this module by value. So this module
has no global state: the state of one handle is on the instance, that of the process in
`deployments.router.live_state`, which methods import when they run. The class overrides methods
that Ray marks as private; the reasons are next to them, and
`tests/integration/parts/test_replica_router_serve.py` fails if Ray changes them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Container
from random import Random
from typing import Any

import ray
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from calm_serve.replicas import EXPLORATION_RATIO, QueueLengths, ReplicaRequest, rank_for_prompt
from calm_serve.types import PromptEnd, ReplicaState
from deployments.router.chosen import ChosenReplica
from deployments.wire import Hints, ReplicaAddress, address_of


class ReplicaRouter(RequestRouter):
    """Ranks an SLM's replicas for each request by its hints (`wire.Hints`).

    The router process asks `choose` and sends the request to the replica's own HTTP port. A call
    of the handle itself, which waits for a replica to start, is load-balanced. Owned by the handle;
    one per handle and process.
    """

    # Serve asks a replica that was idle for ten seconds for its queue length. With Serve's 0.1 s, a
    # replica on a busy machine misses the deadline, and its sessions and prefixes go to other
    # replicas.
    queue_len_response_deadline_s = 1.0

    # Ray declares `**kwargs: Any`. With a named argument, a misspelt key is an error.
    def initialize_state(  # type: ignore[override]
        self, exploration_ratio: float = EXPLORATION_RATIO
    ) -> None:
        """Set up this router; arguments come from `request_router_kwargs`."""
        from deployments.router.live_state import VIEW

        self._view = VIEW
        self._name: str = self._deployment_id.name
        self._exploration_ratio = exploration_ratio
        self._random = Random()
        self._node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._queues = QueueLengths(time.monotonic)
        self._addresses: dict[str, ReplicaAddress] = {}
        self._view.attach(self._name, self._queues.of)
        self._view.attach_chooser(self._name, self)

    def choose(self, hints: Hints, tried: Container[str] = ()) -> ChosenReplica | None:
        """Return the best replica that is not in `tried`; None when there is no other one."""
        left = [
            r
            for r in self._alive(self._replicas_list)
            if r.replica_id.unique_id not in tried and r.replica_id.unique_id in self._addresses
        ]
        if not left:
            return None
        replica_id = self._rank(left, hints)[0][0].replica_id.unique_id
        return ChosenReplica(replica_id, self._addresses[replica_id])

    def sent(self, replica_id: str, hints: Hints) -> None:
        """Count a request that is on its way to a replica."""
        self._queues.sent(replica_id)
        self._view.estimator(self._name).sent(
            hints.get("decision_id", ""),
            hints.get("prefix_chain", ()),
            hints.get("prompt_tokens", 0),
            replica_id,
            self._queues.of(replica_id) or 0,
            hints.get("session_key", ""),
        )

    def answered(
        self, replica_id: str, hints: Hints, *, accepted: bool, ongoing: int | None
    ) -> None:
        """Take a replica's first reaction to a request; `ongoing` is its count of requests."""
        if ongoing is not None:
            self._queues.answered(replica_id, ongoing)
        if not accepted:
            self._view.estimator(self._name).refused(hints.get("decision_id", ""))

    def finished(self, replica_id: str) -> None:
        """Count a request that is over, however it ended."""
        self._queues.finished(replica_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the live candidates as one group, for a call of the handle itself."""
        if pending_request is not None:
            # Without a back-off, Serve retries a full deployment in a loop that never sleeps.
            pending_request.routing_context.should_backoff = True
        return [self._alive(candidate_replicas)]

    def _alive(self, replicas: list[RunningReplica]) -> list[RunningReplica]:
        """Leave out replicas that are known to be dead, although Serve still lists them.

        If there is no other replica they stay: a request to one fails at once.
        """
        alive = [r for r in replicas if not self._view.is_dead(r.replica_id.unique_id)]
        return alive or replicas

    def _rank(self, candidates: list[RunningReplica], hints: Hints) -> list[list[RunningReplica]]:
        request = ReplicaRequest(
            decision_id=hints.get("decision_id", ""),
            prefix_family=hints.get("prefix_family", ""),
            session_key=hints.get("session_key", ""),
            adapter=hints.get("adapter", ""),
            avoid=hints.get("avoid", ""),
            prompt_tokens=hints.get("prompt_tokens", 0),
        )
        known = {s.replica_id: s for s in self._view.replicas(self._name)}
        by_id = {r.replica_id.unique_id: r for r in candidates}
        groups = rank_for_prompt(
            request,
            hints.get("prefix_chain", ()),
            [known.get(replica_id) or _state(r) for replica_id, r in by_id.items()],
            self._view.estimator(self._name),
            local_node_id=self._node_id,
            random=self._random,
            exploration_ratio=self._exploration_ratio,
        )
        return [[by_id[replica_id] for replica_id in group] for group in groups]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Follow membership, adapters and polled statistics."""
        super().update_replicas(replicas)
        self._queues.retain({r.replica_id.unique_id for r in replicas})
        found = {r.replica_id.unique_id: address_of(r.replica_metadata) for r in replicas}
        self._addresses = {name: address for name, address in found.items() if address is not None}
        self._view.update_replicas(self._name, [_state(r) for r in replicas])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica whose actor is dead."""
        super().on_replica_actor_died(replica_id)
        self._view.died(self._name, replica_id.unique_id)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Forget the count of a replica that cannot be reached."""
        super().on_replica_actor_unavailable(replica_id)
        self._queues.forget(replica_id.unique_id)

    # Serve keeps the lengths that it asks for to itself; no public method is told of them.
    async def _probe_queue_lens(
        self, replicas: list[RunningReplica], backoff_index: int
    ) -> list[tuple[RunningReplica, int | None]]:
        asked = {r.replica_id: self._queues.asked(r.replica_id.unique_id) for r in replicas}
        lengths: list[tuple[RunningReplica, int | None]] = await super()._probe_queue_lens(
            replicas, backoff_index
        )
        for replica, length in lengths:
            if length is not None:
                name = replica.replica_id.unique_id
                self._queues.reported(name, length, asked[replica.replica_id])
        return lengths


def _state(replica: RunningReplica) -> ReplicaState:
    stats = replica.routing_stats
    return ReplicaState(
        replica_id=replica.replica_id.unique_id,
        node_id=replica.node_id or "",
        max_queue_length=replica.max_ongoing_requests,
        running=int(_number(stats, "running")),
        waiting=int(_number(stats, "waiting")),
        kv_usage_ratio=_number(stats, "kv_usage_ratio"),
        cached_prefix_ratio=_number(stats, "cached_prefix_ratio"),
        memory_bytes=int(_number(stats, "memory_bytes")),
        recent_prompts=_recent_prompts(stats),
        adapters=tuple(sorted(replica.multiplexed_model_ids)),
    )


def _recent_prompts(stats: dict[str, Any]) -> tuple[PromptEnd, ...]:
    try:
        return tuple(
            PromptEnd(tuple(int(block) for block in blocks), int(tokens))
            for blocks, tokens in stats.get("recent_prompts", ())
        )
    except (TypeError, ValueError):  # as in `_number`
        return ()


def _number(stats: dict[str, Any], name: str) -> float:
    # The SLM deployment fills the dictionary; a bad value in it must not stop replica updates.
    value = stats.get(name, 0.0)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
