"""Policies that choose a replica. `Ours` calls the production ranking; the others are baselines.

A policy sees the replicas as its router process does. `choose` has no side effect, so that another
process's choice can be compared; `record` stores the choice that was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Protocol

from calm_serve.replicas import (
    FirstTokenEstimator,
    QueueLengths,
    ReplicaRequest,
    rank_for_prompt,
)
from calm_serve.types import ReplicaState

Replicas = Sequence[ReplicaState]

BASELINES = ("ray_prefix_rule", "round_robin", "power_of_two", "least_loaded")
"""The policies that ours is compared with; `sticky` is there to show what affinity alone does."""

RAY_MATCH_RATE = 0.1  # Ray's default match_rate_threshold


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as a router sees it; `chain` is `calm_serve.requests.prefix_chain` of its text."""

    decision_id: str
    chain: tuple[int, ...]
    blocks: tuple[int, ...]  # the whole text, for policies that read all of it
    tokens: int
    session: str = ""


class Policy(Protocol):
    """The replica choice of one router process."""

    def attach(self, estimator: FirstTokenEstimator, queues: QueueLengths) -> None:
        """Take what the router process keeps for the choice."""

    def choose(self, prompt: Prompt, replicas: Replicas) -> str:
        """The id of the replica for a request; without side effects."""

    def record(self, prompt: Prompt, replica_id: str) -> None:
        """Store that this router's request was sent to a replica."""


class Ours:
    """`rank_for_prompt` as `deployments.router.request_router` uses it."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def attach(self, estimator: FirstTokenEstimator, queues: QueueLengths) -> None:
        """Use both."""
        self._estimator, self._queues = estimator, queues

    def choose(self, prompt: Prompt, replicas: Replicas) -> str:
        """Return the first replica of the production ranking."""
        chain = prompt.chain
        request = ReplicaRequest(
            decision_id=prompt.decision_id,
            prefix_family=f"{chain[min(1, len(chain) - 1)]:08x}",
            session_key=prompt.session,
            prompt_tokens=prompt.tokens,
        )
        ranked = rank_for_prompt(
            request, chain, replicas, self._estimator, local_node_id="", random=self._random
        )
        return ranked[0][0]

    def record(self, prompt: Prompt, replica_id: str) -> None:
        """Count the request at the replica."""
        self._estimator.sent(
            prompt.decision_id,
            prompt.chain,
            prompt.tokens,
            replica_id,
            self._queues.of(replica_id) or 0,
            prompt.session,
        )


class _Blind:
    """A policy that needs no view."""

    def attach(self, estimator: FirstTokenEstimator, queues: QueueLengths) -> None:
        """Do nothing."""


class RoundRobin(_Blind):
    """One after the other."""

    def __init__(self, seed: int) -> None:
        self._next = Random(seed).randrange(1 << 16)

    def choose(self, prompt: Prompt, replicas: Replicas) -> str:
        """Return the replica whose turn it is."""
        return replicas[self._next % len(replicas)].replica_id

    def record(self, prompt: Prompt, replica_id: str) -> None:
        """Go on to the next replica."""
        self._next += 1


class PowerOfTwo(_Blind):
    """The shorter queue of two replicas drawn at random: Ray Serve's default."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def choose(self, prompt: Prompt, replicas: Replicas) -> str:
        """Return the one of two drawn replicas with the shorter queue."""
        drawn = self._random.sample(replicas, min(2, len(replicas)))
        return min(drawn, key=lambda r: r.queue_length).replica_id

    def record(self, prompt: Prompt, replica_id: str) -> None:
        """Do nothing: the choice has no memory."""


class LeastLoaded(_Blind):
    """The shortest queue of all; ties are drawn."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def choose(self, prompt: Prompt, replicas: Replicas) -> str:
        """Return a replica with the shortest queue."""
        return min(replicas, key=lambda r: (r.queue_length, self._random.random())).replica_id

    def record(self, prompt: Prompt, replica_id: str) -> None:
        """Do nothing: the choice has no memory."""


class Sticky(_Blind):
    """Rendezvous hash of the session, or of the prompt's first 256 characters; ignores load."""

    def choose(self, prompt: Prompt, replicas: Replicas) -> str:
        """Return the replica with the highest hash for the session or first blocks."""
        key = prompt.session or str(prompt.chain[min(1, len(prompt.chain) - 1)])
        return max(replicas, key=lambda r: _weight(key, r.replica_id)).replica_id

    def record(self, prompt: Prompt, replica_id: str) -> None:
        """Do nothing: the hash needs no memory."""


class RayTree:
    """The state of Ray's prefix router: replicas by prefix block, without eviction."""

    def __init__(self) -> None:
        self.holders: dict[int, set[str]] = {}
        self.sizes: dict[str, int] = {}


class RayPrefixRule(_Blind):
    """The rule of Ray's PrefixCacheAffinityRouter with its defaults, reimplemented.

    `imbalanced_threshold` is infinite by default, so load only breaks ties. The longest match
    decides if it covers a tenth of the prompt, else the replica with the smallest tree. All router
    processes share one tree, which Ray keeps in an actor. Ray matches single characters of the
    whole prompt, this class whole blocks.
    """

    def __init__(self, tree: RayTree, seed: int) -> None:
        self._tree = tree
        self._random = Random(seed)

    def choose(self, prompt: Prompt, replicas: Replicas) -> str:
        """Return the least loaded of the replicas that the shared tree names."""
        matched: set[str] = set()
        depth = 0
        for block in prompt.blocks:
            holders = self._tree.holders.get(block)
            if not holders:
                break
            matched, depth = holders, depth + 1
        sizes = self._tree.sizes
        if depth < RAY_MATCH_RATE * len(prompt.blocks):
            smallest = min(sizes.get(r.replica_id, 0) for r in replicas)
            matched = {r.replica_id for r in replicas if sizes.get(r.replica_id, 0) == smallest}
        chosen = [r for r in replicas if r.replica_id in matched]
        return min(chosen, key=lambda r: (r.queue_length, self._random.random())).replica_id

    def record(self, prompt: Prompt, replica_id: str) -> None:
        """Add the prompt's blocks to the replica's part of the shared tree."""
        for block in prompt.blocks:
            holders = self._tree.holders.setdefault(block, set())
            if replica_id not in holders:
                holders.add(replica_id)
                self._tree.sizes[replica_id] = self._tree.sizes.get(replica_id, 0) + 1


MakePolicies = Callable[[int], list[Policy]]


def _ray(routers: int) -> list[Policy]:
    tree = RayTree()
    return [RayPrefixRule(tree, seed) for seed in range(routers)]


def makers() -> dict[str, MakePolicies]:
    """By name, a function that makes one policy per router process."""
    return {
        "ours": lambda n: [Ours(seed) for seed in range(n)],
        "round_robin": lambda n: [RoundRobin(seed) for seed in range(n)],
        "power_of_two": lambda n: [PowerOfTwo(seed) for seed in range(n)],
        "least_loaded": lambda n: [LeastLoaded(seed) for seed in range(n)],
        "sticky": lambda n: [Sticky() for _ in range(n)],
        "ray_prefix_rule": _ray,
    }


def _weight(key: str, replica_id: str) -> bytes:
    return blake2b(f"{key} {replica_id}".encode(), digest_size=8).digest()
