"""Replica selection: by predicted seconds to the first token, now and later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from random import Random

from calm_serve.replicas.first_token import FirstTokenEstimator
from calm_serve.requests import mixed_bits
from calm_serve.types import ReplicaState

# Fitted on the first half of the Mooncake trace and on chats of seeds 1 to 3, with one and eight
# routers; `python -m load_tests prefix` reports the second half and other seeds.

FUTURE_COST = 16.0
"""Seconds that others lose for a second of prefill that a cached prefix would have saved.

The seconds delay every request behind this one, and the copy evicts what others would use. It does
not apply to blocks that many conversations share: a replica computes them once for all of them.
"""

BALANCE_COST = 24.0
"""Mean requests' prefill that a replica costs more when it did twice the mean of recent work."""

BALANCE_SLACK = 0.02
"""Recent work above or below the mean, as a share of it, that counts as even."""

NOISE_RATIO = 0.1
"""Difference that counts as none, in the prefill of a mean request: the hash decides."""

SESSION_RATIO = 8.0
"""The same for a named session: routers that have not served it have to agree before they hear of
it. So it stays until its replica is full. Chosen by hand: from 1.25 down a cached system prompt
wins over the hash (load of 4.5 to 9 in chats at 16 replicas)."""

ADAPTER_LOAD_S = 1.0
"""Of loading an adapter: chosen by hand, because engines do not report it."""

EXPLORATION_RATIO = 0.01
"""Share of requests without a session that try another replica than the best."""

_WEIGHTS = 2.0**64

_Cost = tuple[float, bool, int, str]
"""Seconds; what decides between equals, the lesser first; the replica's id."""


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """What replica selection reads of a request; empty strings mean unknown."""

    decision_id: str = ""
    prefix_family: str = ""
    session_key: str = ""
    adapter: str = ""
    avoid: str = ""  # replica that has just failed this request
    prompt_tokens: int = 0  # estimated


def rank_for_prompt(
    request: ReplicaRequest,
    chain: Sequence[int],
    replicas: Sequence[ReplicaState],
    estimator: FirstTokenEstimator,
    *,
    local_node_id: str,
    random: Random,
    exploration_ratio: float = EXPLORATION_RATIO,
) -> list[list[str]]:
    """Return groups of replica ids, best group first; every replica appears exactly once.

    Replicas come in the order of their cost, in seconds:

    - until the first token: the work ahead, the prompt's tokens that are not cached, the adapter
      if it has to be loaded;
    - of others: `FUTURE_COST` and `BALANCE_COST`;
    - up to the noise of all this, by rendezvous hash of the session or conversation. The less
      one router can know of the others' requests, the larger the noise: they must neither send
      every request to the replica that looks idle, nor one conversation to several replicas. A
      named session prefers the replica to which this process sent it last.

    A conversation so moves only if that gains more than its prefix costs to compute again. Between
    equals, requests without affinity prefer the local node. Saturated replicas and the one to avoid
    are last, as one group. Without exploration (`exploration_ratio` 0, or a request with a session)
    equal input gives equal output in every process.
    """
    eligible, last = _costs(request, chain, replicas, estimator, local_node_id)
    eligible.sort()
    explore = exploration_ratio > 0.0 and not request.session_key and len(eligible) > 1
    if explore and random.random() < exploration_ratio:
        eligible.insert(0, eligible.pop(random.randrange(1, len(eligible))))
    ranked = [[name] for *_, name in eligible]
    if last:
        # One group, so that real queue lengths are asked of all of them at once.
        ranked.append([r.replica_id for r in sorted(last, key=_by_load)])
    return ranked


def _costs(
    request: ReplicaRequest,
    chain: Sequence[int],
    replicas: Sequence[ReplicaState],
    estimator: FirstTokenEstimator,
    local_node_id: str,
) -> tuple[list[_Cost], list[ReplicaState]]:
    """Return the costs of the replicas that may be chosen, and the others."""
    shared = estimator.index.shared(chain)
    # The first own block is the same for all turns of a conversation, unlike the prefix family when
    # conversations share a system prompt.
    affinity = request.session_key or (f"{chain[shared]:08x}" if shared else request.prefix_family)
    key = _hash(affinity or request.decision_id)
    eligible: list[_Cost] = []
    last: list[ReplicaState] = []
    request_s = estimator.request_s
    error_s = estimator.wait_error_s / _WEIGHTS
    served = estimator.served_session(request.session_key)
    # Each process counts its own work, and all must agree on a session's replica.
    balance_s = 0.0 if served or request.session_key else BALANCE_COST * request_s
    estimates = estimator.estimates(chain, shared, request.prompt_tokens, replicas)
    for replica, (wait_s, prefill_s, own_s, excess) in zip(replicas, estimates, strict=True):
        name = replica.replica_id
        if name == request.avoid or replica.queue_length >= replica.max_queue_length:
            last.append(replica)
            continue
        weight = _weight(key, name)
        cost_s = wait_s + prefill_s + FUTURE_COST * own_s - error_s * weight
        if abs(excess) > BALANCE_SLACK:
            cost_s += balance_s * (excess - math.copysign(BALANCE_SLACK, excess))
        if request.adapter and request.adapter not in replica.adapters:
            cost_s += ADAPTER_LOAD_S
        remote = not affinity and replica.node_id != local_node_id
        eligible.append((cost_s, remote, -weight, name))
    if affinity and eligible:
        _prefer(eligible, served, request_s, named=bool(request.session_key))
    return eligible, last


def _prefer(eligible: list[_Cost], served: str, request_s: float, *, named: bool) -> None:
    """Lower the cost of the replica that gets a session or conversation unless others gain."""
    ratio = FUTURE_COST
    at = next((i for i, one in enumerate(eligible) if one[3] == served), -1)
    if at < 0:
        ratio = SESSION_RATIO if named else NOISE_RATIO
        at = min(range(len(eligible)), key=lambda i: eligible[i][2:])
    cost_s, remote, weight, name = eligible[at]
    eligible[at] = (cost_s - ratio * request_s, remote, weight, name)


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
