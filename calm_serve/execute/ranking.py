"""Replica selection: prefix affinity with bounded load, as a pure function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from random import Random

from calm_serve.types import ReplicaState

LOAD_BOUND_RATIO = 1.25
"""How far above the mean load of its peers a replica may be before requests spill over.

Bounded-load consistent hashing (arXiv 1608.01350) with c = 1.25: the usual trade of a quarter
more queueing for affinity. The bound is taken of `mean + 1`, so an idle fleet keeps affinity.
"""

EXPLORATION_RATIO = 0.01
"""Share of requests without a session that try another replica of the best tier."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """What replica selection may know of a request; empty strings say nothing."""

    decision_id: str = ""
    prefix_family: str = ""
    session_key: str = ""
    adapter: str = ""
    avoid: str = ""  # replica that has just failed this request


def rank_replicas(
    request: ReplicaRequest,
    replicas: Sequence[ReplicaState],
    matches: Mapping[str, int],
    *,
    local_node_id: str,
    random: Random,
    exploration_ratio: float = EXPLORATION_RATIO,
) -> list[list[str]]:
    """Return groups of replica ids, best group first; every replica appears exactly once.

    In this order: saturated replicas and the one to avoid are last, as one group; replicas
    holding the requested adapter come before the others; within each such tier those above the
    load bound follow those below. Below the bound a session goes to its rendezvous home, other
    requests to the longest prefix match and then to the rendezvous preference of their prefix
    family, and requests without either to the least loaded replica, the local node first.
    `matches` is `PrefixIndex.match` of the prompt. Without exploration (`exploration_ratio` 0, or
    a request with a session) equal input gives equal output in every process.
    """
    tiers: tuple[list[ReplicaState], ...] = ([], [], [])
    for replica in replicas:
        tiers[_tier(request, replica)].append(replica)
    *preferred, last = tiers
    ranked: list[list[str]] = []
    explore = exploration_ratio > 0.0 and not request.session_key
    for tier in preferred:
        if not tier:
            continue
        within, above = _rank_tier(request, tier, matches, local_node_id)
        # Only the best tier and only below the bound: an exploration never costs an adapter
        # load or a queue.
        if explore and len(within) > 1 and random.random() < exploration_ratio:
            within.insert(0, within.pop(random.randrange(1, len(within))))
        explore = False
        ranked += [[r.replica_id] for r in within]
        ranked += [[r.replica_id] for r in above]
    if last:
        # One group: whoever asks for real queue lengths asks all of them at once.
        ranked.append([r.replica_id for r in sorted(last, key=_by_load)])
    return ranked


def _tier(request: ReplicaRequest, replica: ReplicaState) -> int:
    if replica.replica_id == request.avoid or replica.queue_length >= replica.max_queue_length:
        return 2
    return 1 if request.adapter and request.adapter not in replica.adapters else 0


def _rank_tier(
    request: ReplicaRequest,
    tier: list[ReplicaState],
    matches: Mapping[str, int],
    local_node_id: str,
) -> tuple[list[ReplicaState], list[ReplicaState]]:
    """Return the tier's replicas below the load bound and those above it, each best first."""
    mean = sum(r.queue_length for r in tier) / len(tier)
    bound = math.ceil(LOAD_BOUND_RATIO * (mean + 1.0))
    affinity = request.session_key or request.prefix_family
    key = _hash(affinity or request.decision_id)
    weight = {r.replica_id: _weight(key, r.replica_id) for r in tier}
    home = max(weight, key=lambda r: (weight[r], r)) if request.session_key else ""

    def by_affinity(r: ReplicaState) -> tuple[bool, int, int, str]:
        # A session's home comes before longer matches: matches differ between router
        # processes, and a shared system prompt would pull every session to one replica.
        rid = r.replica_id
        return rid != home, -matches.get(rid, 0), -weight[rid], rid

    def by_load(r: ReplicaState) -> tuple[int, int, bool, int, str]:
        rid = r.replica_id
        remote = r.node_id != local_node_id
        return r.queue_length, -matches.get(rid, 0), remote, -weight[rid], rid

    within = [r for r in tier if r.queue_length <= bound]
    above = [r for r in tier if r.queue_length > bound]
    if affinity or matches:
        within.sort(key=by_affinity)
    else:
        within.sort(key=by_load)
    above.sort(key=by_load)
    return within, above


def _by_load(replica: ReplicaState) -> tuple[int, str]:
    return replica.queue_length - replica.max_queue_length, replica.replica_id


def _hash(text: str) -> int:
    """Return 64 bits that are the same in every process, unlike the built-in `hash`."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


# Replica ids recur with every request; keys do not, and would only push them out.
_replica_hash = lru_cache(maxsize=4096)(_hash)


def _weight(key: int, replica_id: str) -> int:
    """Return the rendezvous weight: the two hashes mixed (splitmix64's finaliser)."""
    x = key ^ _replica_hash(replica_id)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
