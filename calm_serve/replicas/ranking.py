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
from calm_serve.types import ReplicaState

LOAD_BOUND_RATIO = 1.5
"""How far above the mean load of its peers a replica may be before requests spill over.

Bounded-load consistent hashing (arXiv 1608.01350). The bound is taken of `mean + 1`, so an idle
fleet keeps affinity. Below it, affinity is weighed against load; see `_Scale`.
"""

# What speaks for a replica, in shares of a prompt that need not be computed. Found with the
# simulation of `python -m load_tests prefix`.
SHARED_VALUE = 0.5  # of a cached block that many conversations share: another replica pays it once
HOME_VALUE = 0.5  # of being the conversation's rendezvous choice, which all processes agree on
SESSION_VALUE = 1.5  # the same where the client names the session: more than any match
# Of being its second choice, while nobody has any of the prompt: two choices avoid most of a queue
# that one choice by hash runs into, and processes still look for the conversation in two places.
SECOND_HOME_VALUE = 0.45

# What speaks against it.
QUEUE_COST = 0.4  # of a request more than in the shortest queue, over the mean queue + 1
QUEUE_SLACK = 1  # requests that cost nothing: a difference of one is noise
# Recent work above the mean takes away the value of home: nothing of it up to the first ratio, all
# and `WORK_EXCESS_COST` more from the second on. Work in the past may thus undo a choice by hash,
# never what is cached: a lone chat stays where it is. It has no say over a named session, because
# every process counts its own work, and all are to send a session's turns to the same replica.
WORK_RATIOS = (1.1, 1.22)
WORK_EXCESS_COST = 0.1
WORK_START_BLOCKS = 256.0  # added to each replica: a few requests more are not yet uneven

EXPLORATION_RATIO = 0.01
"""Share of requests without a session that try another replica of the best tier."""

_MASK = (1 << 64) - 1
_NO_WORK: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """What replica selection may know of a request; empty strings say nothing."""

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
    """Return `rank_replicas` of a prompt with all that `index` knows of it.

    Where the prompt begins like others, the first block of its own takes the place of the prefix
    family, which would be the same for every conversation with the same system prompt.
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

    In this order: saturated replicas and the one to avoid are last, as one group; replicas
    holding the requested adapter come before the others; within each such tier those above the
    load bound follow those below. Below the bound, what a replica has of the prompt and being the
    rendezvous home of the session, or of the prefix family, are weighed against its queue and the
    work it was given recently; requests without any of this go to the least loaded replica, the
    local node first. `matches` and `work` are those of `PrefixIndex`. Without exploration
    (`exploration_ratio` 0, or a request with a session) equal input gives equal output in every
    process.
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
        within, above = _rank_tier(request, tier, matches, work, local_node_id)
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
        homes = _homes(request, weight, matches) if affinity else {}
        scale = _scale(request, tier, matches, work, mean)
        within.sort(
            key=lambda r: (
                -scale.score(r, matches, work, homes),
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
    """What one tier's replicas are compared by."""

    blocks: int  # of the prompt
    shared_blocks: int
    work_cost: float  # of a replica that had too much of it
    shortest_queue: int
    mean_queue: float
    mean_work: float

    def score(
        self,
        replica: ReplicaState,
        matches: Mapping[str, int],
        work: Mapping[str, float],
        homes: Mapping[str, float],
    ) -> float:
        """Value less cost, in shares of the prompt."""
        rid = replica.replica_id
        matched = matches.get(rid, 0)
        shared = min(matched, self.shared_blocks)
        value = (matched - shared + SHARED_VALUE * shared) / self.blocks
        value += homes.get(rid, 0.0)
        queued = max(0, replica.queue_length - self.shortest_queue - QUEUE_SLACK)
        low, high = WORK_RATIOS
        worked = (work.get(rid, 0.0) + WORK_START_BLOCKS) / self.mean_work
        uneven = min(max(0.0, (worked - low) / (high - low)), 1.0)
        return value - QUEUE_COST * queued / (self.mean_queue + 1.0) - uneven * self.work_cost


def _homes(
    request: ReplicaRequest, weight: Mapping[str, int], matches: Mapping[str, int]
) -> dict[str, float]:
    """Return what being the rendezvous choice is worth, for the replicas that are it."""
    first, *others = heapq.nlargest(2, weight, key=lambda r: (weight[r], r))
    if request.session_key:
        return {first: SESSION_VALUE}
    if matches or not others:
        return {first: HOME_VALUE}
    return {first: HOME_VALUE, others[0]: SECOND_HOME_VALUE}


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
        work_cost=0.0 if request.session_key else HOME_VALUE + WORK_EXCESS_COST,
        shortest_queue=min(r.queue_length for r in tier),
        mean_queue=mean_queue,
        mean_work=worked + WORK_START_BLOCKS,
    )


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
