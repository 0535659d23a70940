"""Replicas with an LRU block cache and a queue, in front of them router processes; simulated.

An engine computes prompts one after the other, in the order of arrival, and decodes beside that at
a fixed pace. Its cache takes a prompt's blocks when it is sent; only leading blocks can be hits.
A router process has its own index and its own view of the load, which ages as with Ray Serve: it
counts its own requests, learns a replica's true number at each request it sends there, forgets it
after `QUEUE_LIFETIME_S`, and otherwise has the statistics that are polled every `POLL_S`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from calm_serve.testing import FakeClock
from calm_serve.types import ReplicaState
from deployments.router.live_state import LiveView
from load_tests.prefix.policies import MakePolicies, Policy, Prompt
from load_tests.prefix.world import Workload

PREFILL_TOKENS_PER_S = 12_000.0
TPOT_S = 0.02
MAX_ONGOING = 256
QUEUE_LIFETIME_S = 10.0
POLL_S = 1.0
SLM = "slm"


class BlockCache:
    """Blocks of prompts, the least recently used gone first, tails before heads."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def hits(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are here."""
        found = 0
        for block in blocks:
            if block not in self._blocks:
                break
            found += 1
        return found

    def take(self, blocks: Sequence[int]) -> int:
        """Leading blocks that were here; all are afterwards, as far as there is room."""
        found = self.hits(blocks)
        for block in reversed(blocks):
            self._blocks.pop(block, None)
            self._blocks[block] = None
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
        return found


def ceiling(workload: Workload, max_blocks: int) -> float:
    """Share of prompt tokens that one cache of `max_blocks` blocks in one place would hold.

    No fleet whose caches hold as much together can be expected to do better, as every replica
    has to hold what all share; it is an upper reference, not a bound that was proved.
    """
    cache = BlockCache(max_blocks)
    cached = sum(
        min(cache.take(a.blocks) * workload.block_tokens, a.input_tokens) for a in workload.asks
    )
    return cached / workload.input_tokens


class _Engine:
    def __init__(self, cache_blocks: int) -> None:
        self.cache = BlockCache(cache_blocks)
        self.ongoing = 0
        self.work_tokens = 0
        self.requests = 0
        self._free_at_s = 0.0

    def submit(self, at_s: float, computed: int, output: int) -> tuple[float, float]:
        """When the first token comes and when the answer ends."""
        self._free_at_s = max(at_s, self._free_at_s) + computed / PREFILL_TOKENS_PER_S
        first_s = self._free_at_s + TPOT_S
        self.ongoing += 1
        self.requests += 1
        self.work_tokens += computed + output
        return first_s, first_s + max(output - 1, 0) * TPOT_S


class _Router:
    """One process: its policy and its view."""

    def __init__(self, policy: Policy, clock: FakeClock) -> None:
        self.policy = policy
        self.view = LiveView(clock)
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}
        self.view.attach(SLM, self._queue_length)

    def replicas(self) -> Sequence[ReplicaState]:
        return self.view.replicas(SLM)

    def learn(self, replica_id: str, queue_length: int) -> None:
        self._known[replica_id] = (self._clock(), queue_length)

    def ended(self, replica_id: str) -> None:
        known = self._known.get(replica_id)
        if known is not None:
            self._known[replica_id] = (self._clock(), max(known[1] - 1, 0))

    def _queue_length(self, replica_id: str) -> int | None:
        known = self._known.get(replica_id)
        if known is None or self._clock() - known[0] > QUEUE_LIFETIME_S:
            return None
        return known[1]


@dataclass(frozen=True)
class Result:
    """What happened; load is work: prompt tokens computed and tokens generated."""

    cached_share: float
    load_imbalance: float
    request_imbalance: float
    ttft_p50_s: float
    ttft_p95_s: float
    agreement: float  # share of requests for which another router would have chosen the same


class Simulation:
    """A workload on `replicas` replicas behind `routers` router processes; seeded."""

    def __init__(
        self,
        workload: Workload,
        chains: Sequence[tuple[int, ...]],
        replicas: int,
        routers: int,
        cache_blocks: int,
        seed: int = 0,
    ) -> None:
        self._workload = workload
        self._chains = chains
        self._ids = [f"r{i:02d}" for i in range(replicas)]
        self._routers = routers
        self._cache_blocks = cache_blocks
        self._seed = seed

    def run(self, make: MakePolicies) -> Result:
        """Replay everything with one policy, from empty caches."""
        clock = FakeClock(0.0)
        engines = {i: _Engine(self._cache_blocks) for i in self._ids}
        routers = [_Router(policy, clock) for policy in make(self._routers)]
        rng = Random(f"simulation {self._seed}")
        ends: list[tuple[float, str, int]] = []
        ttfts: list[float] = []
        cached = agreed = 0
        polled_s = -POLL_S
        for number, (ask, chain) in enumerate(zip(self._workload.asks, self._chains, strict=True)):
            while ends and ends[0][0] <= ask.at_s:
                clock.now_s, replica_id, router = heapq.heappop(ends)
                engines[replica_id].ongoing -= 1
                routers[router].ended(replica_id)
            clock.now_s = ask.at_s
            if ask.at_s - polled_s >= POLL_S:
                polled_s = ask.at_s
                states = [_state(i, e) for i, e in engines.items()]
                for one in routers:
                    one.view.update_replicas(SLM, states)
            at = rng.randrange(len(routers))
            prompt = Prompt(f"d{number}", chain, ask.blocks, ask.session)
            chosen = routers[at].policy.choose(prompt, routers[at].replicas())
            if len(routers) > 1:
                other = routers[(at + rng.randrange(1, len(routers))) % len(routers)]
                agreed += other.policy.choose(prompt, other.replicas()) == chosen
            engine = engines[chosen]
            hit = min(engine.cache.take(ask.blocks) * self._workload.block_tokens, ask.input_tokens)
            cached += hit
            first_s, end_s = engine.submit(ask.at_s, ask.input_tokens - hit, ask.output_tokens)
            ttfts.append(first_s - ask.at_s)
            heapq.heappush(ends, (end_s, chosen, at))
            routers[at].policy.placed(prompt, chosen)
            routers[at].learn(chosen, engine.ongoing)
        ttfts.sort()
        return Result(
            cached_share=cached / self._workload.input_tokens,
            load_imbalance=imbalance([e.work_tokens for e in engines.values()]),
            request_imbalance=imbalance([e.requests for e in engines.values()]),
            ttft_p50_s=ttfts[len(ttfts) // 2],
            ttft_p95_s=ttfts[len(ttfts) * 95 // 100],
            agreement=agreed / len(ttfts) if len(routers) > 1 else 1.0,
        )


def imbalance(loads: Sequence[float]) -> float:
    """The largest over the mean."""
    return max(loads) * len(loads) / max(sum(loads), 1e-9)


def _state(replica_id: str, engine: _Engine) -> ReplicaState:
    return ReplicaState(replica_id, running=engine.ongoing, max_queue_length=MAX_ONGOING)
