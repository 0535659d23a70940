"""Simulation of replicas with an LRU block cache and a queue, behind router processes.

An engine computes prompts one after the other, in the order of arrival, and decodes concurrently at
a fixed pace. A prompt's blocks enter its cache when the request is sent; only leading blocks can be
hits. A router process has its own view, as with Ray Serve: it counts its own requests, receives a
replica's true queue length with each request that it sends there, and the engine's load with each
of its answers. All routers receive what replicas report every `POLL_S`, `REPORT_DELAY_S` later.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from calm_serve.replicas import QueueLengths
from calm_serve.testing import FakeClock
from calm_serve.types import EngineFacts, PromptEnd, ReplicaState
from deployments.router.live_state import LiveView
from load_tests.prefix.policies import MakePolicies, Policy, Prompt
from load_tests.prefix.world import Request, Workload

PREFILL_TOKENS_PER_S = 12_000.0
TPOT_S = 0.02
MAX_ONGOING = 256
POLL_S = 1.0
REPORT_DELAY_S = 0.2
RECENT = 32  # prompts in a report, as in `deployments.slm.deployment`
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
    def __init__(self, replica_id: str, cache_blocks: int) -> None:
        self._id = replica_id
        self.cache = BlockCache(cache_blocks)
        self.ongoing = 0
        self.work_tokens = 0
        self.requests = 0
        self._free_at_s = 0.0
        self.recent: deque[PromptEnd] = deque(maxlen=RECENT)
        self._starts: deque[float] = deque()  # of requests that may still wait

    def submit(self, at_s: float, computed: int, output: int) -> tuple[float, float, float]:
        """Times of the start, the first token, and the end of the answer."""
        start_s = max(at_s, self._free_at_s)
        self._free_at_s = start_s + computed / PREFILL_TOKENS_PER_S
        first_s = self._free_at_s + TPOT_S
        self._starts.append(start_s)
        self.ongoing += 1
        self.requests += 1
        self.work_tokens += computed + output
        return start_s, first_s, first_s + max(output - 1, 0) * TPOT_S

    def state(self, now_s: float) -> ReplicaState:
        """What the replica reports: waiting requests are those whose computation has not begun."""
        while self._starts and self._starts[0] <= now_s:
            self._starts.popleft()
        waiting = len(self._starts)
        return ReplicaState(
            self._id,
            running=self.ongoing - waiting,
            waiting=waiting,
            max_queue_length=MAX_ONGOING,
            recent_prompts=tuple(self.recent),
        )


class _Router:
    """One router process: its policy and its view of the replicas."""

    def __init__(self, policy: Policy, clock: FakeClock) -> None:
        self.policy = policy
        self.view = LiveView(clock)
        self.queues = QueueLengths(clock)
        self.view.attach(SLM, self.queues.of)
        policy.attach(self.view.estimator(SLM), self.queues)

    def choose(self, prompt: Prompt) -> str:
        return self.policy.choose(prompt, self.view.replicas(SLM))

    def sent(self, prompt: Prompt, replica_id: str, queue_length: int) -> None:
        """Count a request that a replica accepted with its true queue length."""
        self.queues.sent(replica_id)
        self.queues.answered(replica_id, queue_length)
        self.policy.record(prompt, replica_id)


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
        world = _World(self._ids, self._cache_blocks, make(self._routers))
        rng = Random(f"simulation {self._seed}")
        ttfts: list[float] = []
        cached = agreed = 0
        for number, (request, chain) in enumerate(
            zip(self._workload.requests, self._chains, strict=True)
        ):
            world.advance(request.at_s)
            routers = world.routers
            at = rng.randrange(len(routers))
            prompt = Prompt(
                f"d{number}", chain, request.blocks, request.input_tokens, request.session
            )
            chosen = routers[at].choose(prompt)
            if len(routers) > 1:
                other = routers[(at + rng.randrange(1, len(routers))) % len(routers)]
                agreed += other.choose(prompt) == chosen
            facts = world.serve(request, prompt, routers[at], chosen, self._workload.block_tokens)
            cached += facts.cached_tokens
            ttfts.append(facts.ttft_s)
        ttfts.sort()
        engines = world.engines.values()
        return Result(
            cached_share=cached / self._workload.input_tokens,
            load_imbalance=imbalance([e.work_tokens for e in engines]),
            request_imbalance=imbalance([e.requests for e in engines]),
            ttft_p50_s=ttfts[len(ttfts) // 2],
            ttft_p95_s=ttfts[len(ttfts) * 95 // 100],
            agreement=agreed / len(ttfts) if self._routers > 1 else 1.0,
        )


class _World:
    """Engines and routers on one clock, and what is yet to happen."""

    def __init__(self, ids: Sequence[str], cache_blocks: int, policies: Sequence[Policy]) -> None:
        self._clock = FakeClock(0.0)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()  # of events at one time
        self.engines = {i: _Engine(i, cache_blocks) for i in ids}
        self.routers = [_Router(policy, self._clock) for policy in policies]
        self._deliver([e.state(0.0) for e in self.engines.values()])
        self._at(POLL_S / 2, self._poll)

    def advance(self, until_s: float) -> None:
        """Let everything happen that is due by then."""
        while self._events and self._events[0][0] <= until_s:
            self._clock.now_s, _, event = heapq.heappop(self._events)
            event()
        self._clock.now_s = until_s

    def serve(
        self, request: Request, prompt: Prompt, router: _Router, replica_id: str, block_tokens: int
    ) -> EngineFacts:
        """Send a request to a replica; returns the facts that its answer will have."""
        engine, now_s = self.engines[replica_id], self._clock()
        found = engine.cache.take(request.blocks) * block_tokens
        cached = min(found, request.input_tokens)
        start_s, first_s, end_s = engine.submit(
            now_s, request.input_tokens - cached, request.output_tokens
        )
        engine.recent.append(PromptEnd(prompt.chain[-2:], request.input_tokens))
        facts = EngineFacts(
            replica_id=replica_id,
            prompt_tokens=request.input_tokens,
            cached_tokens=cached,
            output_tokens=request.output_tokens,
            queue_s=start_s - now_s,
            ttft_s=first_s - now_s,
        )
        self._at(end_s, partial(self._end, router, prompt.decision_id, facts))
        router.sent(prompt, replica_id, engine.ongoing)
        return facts

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), event))

    def _poll(self) -> None:
        now_s = self._clock()
        states = [e.state(now_s) for e in self.engines.values()]
        self._at(now_s + REPORT_DELAY_S, partial(self._deliver, states))
        self._at(now_s + POLL_S, self._poll)

    def _deliver(self, states: Sequence[ReplicaState]) -> None:
        for router in self.routers:
            router.view.update_replicas(SLM, states)

    def _end(self, router: _Router, decision_id: str, facts: EngineFacts) -> None:
        """An answer ends: the engine reports its load with it, as it is then."""
        engine = self.engines[facts.replica_id]
        engine.ongoing -= 1
        state = engine.state(self._clock())
        router.queues.finished(facts.replica_id)
        facts = replace(facts, running=state.running, waiting=state.waiting)
        router.view.observe(SLM, facts, decision_id)


def imbalance(loads: Sequence[float]) -> float:
    """The largest load over the mean."""
    return max(loads) * len(loads) / max(sum(loads), 1e-9)
