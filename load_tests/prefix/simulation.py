"""Simulation of replicas with an LRU block cache and a queue, behind router processes.

An engine computes prompts one after the other, in the order of arrival, and decodes concurrently at
a fixed pace. A prompt's blocks enter its cache when the request is sent; only leading blocks can be
hits. A router process has its own prefix index and its own view of the load, as with Ray Serve: it
counts its own requests, and receives a replica's true queue length with each request that it sends
there. It uses that length for `QUEUE_LIFETIME_S`, and after that the statistics that are polled
every `POLL_S`.
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
    """An LRU cache of prompt blocks; a prompt's last blocks are evicted before its first."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def hits(self, blocks: Sequence[int]) -> int:
        """Number of leading blocks in the cache."""
        found = 0
        for block in blocks:
            if block not in self._blocks:
                break
            found += 1
        return found

    def take(self, blocks: Sequence[int]) -> int:
        """Number of leading blocks that were in the cache; then adds all blocks that fit."""
        found = self.hits(blocks)
        for block in reversed(blocks):
            self._blocks.pop(block, None)
            self._blocks[block] = None
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
        return found


def ceiling(workload: Workload, max_blocks: int) -> float:
    """Share of prompt tokens served by a single cache of `max_blocks` blocks.

    An upper reference, not a proven bound: a fleet whose caches have this size together is expected
    to do worse, because each replica has to hold the blocks that all prompts share.
    """
    cache = BlockCache(max_blocks)
    cached = sum(
        min(cache.take(a.blocks) * workload.block_tokens, a.input_tokens) for a in workload.requests
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
        """Times of the first token and of the end of the answer."""
        self._free_at_s = max(at_s, self._free_at_s) + computed / PREFILL_TOKENS_PER_S
        first_s = self._free_at_s + TPOT_S
        self.ongoing += 1
        self.requests += 1
        self.work_tokens += computed + output
        return first_s, first_s + max(output - 1, 0) * TPOT_S


class _Router:
    """One router process: its policy and its view of the replicas."""

    def __init__(self, policy: Policy, clock: FakeClock) -> None:
        self.policy = policy
        self.view = LiveView(clock)
        self._clock = clock
        self._reported: dict[str, tuple[float, int]] = {}
        self.view.attach(SLM, self._queue_length)

    def replicas(self) -> Sequence[ReplicaState]:
        return self.view.replicas(SLM)

    def report(self, replica_id: str, queue_length: int) -> None:
        self._reported[replica_id] = (self._clock(), queue_length)

    def ended(self, replica_id: str) -> None:
        reported = self._reported.get(replica_id)
        if reported is not None:
            self._reported[replica_id] = (self._clock(), max(reported[1] - 1, 0))

    def _queue_length(self, replica_id: str) -> int | None:
        reported = self._reported.get(replica_id)
        if reported is None or self._clock() - reported[0] > QUEUE_LIFETIME_S:
            return None
        return reported[1]


@dataclass(frozen=True)
class Result:
    """The result of one policy; load is work: prompt tokens computed plus tokens generated."""

    cached_share: float
    load_imbalance: float
    request_imbalance: float
    ttft_p50_s: float
    ttft_p95_s: float
    agreement: float  # share of requests for which another router would choose the same replica


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
        """Run the workload with one policy, starting with empty caches."""
        clock = FakeClock(0.0)
        engines = {i: _Engine(self._cache_blocks) for i in self._ids}
        routers = [_Router(policy, clock) for policy in make(self._routers)]
        rng = Random(f"simulation {self._seed}")
        ends: list[tuple[float, str, int]] = []
        ttfts: list[float] = []
        cached = agreed = 0
        polled_s = -POLL_S
        for number, (request, chain) in enumerate(
            zip(self._workload.requests, self._chains, strict=True)
        ):
            while ends and ends[0][0] <= request.at_s:
                clock.now_s, replica_id, router = heapq.heappop(ends)
                engines[replica_id].ongoing -= 1
                routers[router].ended(replica_id)
            clock.now_s = request.at_s
            if request.at_s - polled_s >= POLL_S:
                polled_s = request.at_s
                states = [_state(i, e) for i, e in engines.items()]
                for one in routers:
                    one.view.update_replicas(SLM, states)
            at = rng.randrange(len(routers))
            prompt = Prompt(f"d{number}", chain, request.blocks, request.session)
            chosen = routers[at].policy.choose(prompt, routers[at].replicas())
            if len(routers) > 1:
                other = routers[(at + rng.randrange(1, len(routers))) % len(routers)]
                agreed += other.policy.choose(prompt, other.replicas()) == chosen
            engine = engines[chosen]
            found = engine.cache.take(request.blocks) * self._workload.block_tokens
            hit = min(found, request.input_tokens)
            cached += hit
            first_s, end_s = engine.submit(
                request.at_s, request.input_tokens - hit, request.output_tokens
            )
            ttfts.append(first_s - request.at_s)
            heapq.heappush(ends, (end_s, chosen, at))
            routers[at].policy.record(prompt, chosen)
            routers[at].report(chosen, engine.ongoing)
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
    """The largest load over the mean."""
    return max(loads) * len(loads) / max(sum(loads), 1e-9)


def _state(replica_id: str, engine: _Engine) -> ReplicaState:
    return ReplicaState(replica_id, running=engine.ongoing, max_queue_length=MAX_ONGOING)
