"""Replica selection: prefix affinity with bounded load, as a pure function."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from random import Random
from types import MappingProxyType

from calm_serve.replicas.prefix_index import PrefixIndex
from calm_serve.requests import mixed_bits
from calm_serve.types import ReplicaState

LOAD_BOUND_RATIO = 1.5
"""How far above the mean load of its peers a replica may be before requests spill over.

Bounded-load consistent hashing (arXiv 1608.01350). The bound is taken of `mean + 1`, so an idle
fleet keeps affinity. Below it, affinity is weighed against load; see `_Scale`.
"""

# Positive terms of a replica's score, in shares of the prompt that need not be computed. Tuned with
# the simulation of `python -m load_tests prefix`.
SHARED_VALUE = 0.5  # of a cached block that many conversations share: computed once per replica
PREFERRED_VALUE = 0.5  # of the first choice by rendezvous hash, which is the same in all processes
SESSION_VALUE = 1.5  # the same when the client names the session: more than any prefix match
# Of the second choice by rendezvous hash, while no replica has any of the prompt: two choices avoid
# most of the queue that builds up at one, and processes still find the conversation in two places.
SECOND_PREFERRED_VALUE = 0.45

# Negative terms.
QUEUE_COST = 0.4  # of a request more than in the shortest queue, over the mean queue + 1
QUEUE_SLACK = 1  # requests that cost nothing: a difference of one is noise
# Recent work above the mean cancels the value of the preferred replica: none of it up to the first
# ratio, all of it and `WORK_EXCESS_COST` more from the second on. Past work may thus override the
# hash but no cached prefix: a single chat stays on its replica. It does not apply to a named
# session, because every process counts its own work and all must agree on a session's replica.
WORK_RATIOS = (1.1, 1.22)
# Chosen by hand: above 0, so that the most loaded replica loses to one that is otherwise equal. The
# unit tests of this room pass without it.
WORK_EXCESS_COST = 0.1
WORK_START_BLOCKS = 256.0  # added to each replica: a few requests more are not yet uneven

EXPLORATION_RATIO = 0.01
"""Share of requests without a session that try another replica of the best tier."""

_NO_WORK: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """What replica selection reads of a request; empty strings mean unknown."""

    decision_id: str = ""
    prefix_family: str = ""
    session_key: str = ""
    adapter: str = ""
    avoid: str = ""  # replica that has just failed this request
    prompt_blocks: int = 0  # length of the prefix chain
    shared_blocks: int = 0  # `PrefixIndex.shared` of it


def rank_for_prompt(
    request: ReplicaRequest,
    chain: Sequence[int],
    replicas: Sequence[ReplicaState],
    index: PrefixIndex,
    *,
    local_node_id: str,
    random: Random,
    exploration_ratio: float = EXPLORATION_RATIO,
) -> list[list[str]]:
    """Return `rank_replicas` for a prompt, with the matches and the work in `index`.

    When the prompt's start is shared with other conversations, its first own block replaces the
    prefix family, which is the same for all conversations with one system prompt.
    """
    shared = index.shared(chain)
    family = f"{chain[shared]:08x}" if shared else request.prefix_family
    return rank_replicas(
        replace(request, prefix_family=family, prompt_blocks=len(chain), shared_blocks=shared),
        replicas,
        index.match(chain),
        index.work,
        local_node_id=local_node_id,
        random=random,
        exploration_ratio=exploration_ratio,
    )


def rank_replicas(
    request: ReplicaRequest,
    replicas: Sequence[ReplicaState],
    matches: Mapping[str, int],
    work: Mapping[str, float] = _NO_WORK,
    *,
    local_node_id: str,
    random: Random,
    exploration_ratio: float = EXPLORATION_RATIO,
) -> list[list[str]]:
    """Return groups of replica ids, best group first; every replica appears exactly once.

    Saturated replicas and the one to avoid are last, as one group. Replicas that have loaded the
    requested adapter come before the others. Within each such tier, replicas above the load bound
    follow those below. Below the bound, a replica's cached share of the prompt, and being the
    preferred replica (by rendezvous hash) of the session or prefix family, are weighed against its
    queue and its recent work; a request without affinity goes to the least loaded replica, of the
    local node first. `matches` and `work` are those of `PrefixIndex`. Without exploration
    (`exploration_ratio` 0, or a request with a session) equal input gives equal output in every
    process.
    """
    tiers: tuple[list[ReplicaState], ...] = ([], [], [])
    for replica in replicas:
        tiers[_tier(request, replica)].append(replica)
    *eligible, last = tiers
    ranked: list[list[str]] = []
    explore = exploration_ratio > 0.0 and not request.session_key
    for tier in eligible:
        if not tier:
            continue
        within, above = _rank_tier(request, tier, matches, work, local_node_id)
        # Only the best tier and only below the bound: an exploration never costs an adapter
        # load or a queue.
        if explore and len(within) > 1 and random.random() < exploration_ratio:
            within.insert(0, within.pop(random.randrange(1, len(within))))
        explore = False
        ranked += [[r.replica_id] for r in within]
        ranked += [[r.replica_id] for r in above]
    if last:
        # One group, so that real queue lengths are asked of all of them at once.
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
    work: Mapping[str, float],
    local_node_id: str,
) -> tuple[list[ReplicaState], list[ReplicaState]]:
    """Return the tier's replicas below the load bound and those above it, each best first."""
    mean = sum(r.queue_length for r in tier) / len(tier)
    bound = math.ceil(LOAD_BOUND_RATIO * (mean + 1.0))
    affinity = request.session_key or request.prefix_family
    key = _hash(affinity or request.decision_id)
    weight = {r.replica_id: _weight(key, r.replica_id) for r in tier}

    def by_load(r: ReplicaState) -> tuple[int, int, bool, int, str]:
        rid = r.replica_id
        remote = r.node_id != local_node_id
        return r.queue_length, -matches.get(rid, 0), remote, -weight[rid], rid

    within = [r for r in tier if r.queue_length <= bound]
    above = [r for r in tier if r.queue_length > bound]
    if affinity or matches:
        preferred = _preferred_values(request, weight, matches) if affinity else {}
        scale = _scale(request, tier, matches, work, mean)
        within.sort(
            key=lambda r: (
                -scale.score(r, matches, work, preferred),
                -weight[r.replica_id],
                r.replica_id,
            )
        )
    else:
        within.sort(key=by_load)
    above.sort(key=by_load)
    return within, above


@dataclass(frozen=True, slots=True)
class _Scale:
    """Reference values by which one tier's replicas are scored."""

    blocks: int  # of the prompt
    shared_blocks: int
    work_cost: float  # of a replica with recent work far above the mean
    shortest_queue: int
    mean_queue: float
    mean_work: float

    def score(
        self,
        replica: ReplicaState,
        matches: Mapping[str, int],
        work: Mapping[str, float],
        preferred: Mapping[str, float],
    ) -> float:
        """Return value minus cost, in shares of the prompt."""
        rid = replica.replica_id
        matched = matches.get(rid, 0)
        shared = min(matched, self.shared_blocks)
        value = (matched - shared + SHARED_VALUE * shared) / self.blocks
        value += preferred.get(rid, 0.0)
        queued = max(0, replica.queue_length - self.shortest_queue - QUEUE_SLACK)
        low, high = WORK_RATIOS
        worked = (work.get(rid, 0.0) + WORK_START_BLOCKS) / self.mean_work
        uneven = min(max(0.0, (worked - low) / (high - low)), 1.0)
        return value - QUEUE_COST * queued / (self.mean_queue + 1.0) - uneven * self.work_cost


def _preferred_values(
    request: ReplicaRequest, weight: Mapping[str, int], matches: Mapping[str, int]
) -> dict[str, float]:
    """Return the score terms of the first and second rendezvous choice."""
    first, *others = heapq.nlargest(2, weight, key=lambda r: (weight[r], r))
    if request.session_key:
        return {first: SESSION_VALUE}
    if matches or not others:
        return {first: PREFERRED_VALUE}
    return {first: PREFERRED_VALUE, others[0]: SECOND_PREFERRED_VALUE}


def _scale(
    request: ReplicaRequest,
    tier: list[ReplicaState],
    matches: Mapping[str, int],
    work: Mapping[str, float],
    mean_queue: float,
) -> _Scale:
    # `fsum`: the sum must not depend on the order in which replicas come.
    worked = math.fsum(work.get(r.replica_id, 0.0) for r in tier) / len(tier)
    return _Scale(
        blocks=max(request.prompt_blocks, max(matches.values(), default=0), 1),
        shared_blocks=request.shared_blocks,
        work_cost=0.0 if request.session_key else PREFERRED_VALUE + WORK_EXCESS_COST,
        shortest_queue=min(r.queue_length for r in tier),
        mean_queue=mean_queue,
        mean_work=worked + WORK_START_BLOCKS,
    )


def _by_load(replica: ReplicaState) -> tuple[int, str]:
    return replica.queue_length - replica.max_queue_length, replica.replica_id


def _hash(text: str) -> int:
    """Return 64 bits that are the same in every process, unlike the built-in `hash`."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


# Replica ids recur with every request; keys do not and would evict them.
_replica_hash = lru_cache(maxsize=4096)(_hash)


def _weight(key: int, replica_id: str) -> int:
    """Return the rendezvous weight: the two hashes mixed."""
    return mixed_bits(key ^ _replica_hash(replica_id))
