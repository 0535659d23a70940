"""Requests on simulated time: arrivals, router processes, replicas with queues, answers."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from time import thread_time_ns

from calm_serve.config import Fleet
from calm_serve.prediction import Predictor
from calm_serve.testing import EngineSimulator, FakeClock, Served, make_facts, make_outcome
from calm_serve.types import Decision, EngineFacts, Outcome, ReplicaState
from load_tests.decision.world import body
from load_tests.scale.router import RouterProcess

SLOTS = 16
OUTPUT_TOKENS = 64.0  # mean; lengths are exponential, so service times are uneven
NEW_SHARE = 0.7  # of the prompts are new from their first block; the others repeat an earlier one
SESSION_SHARE = 0.2
SESSIONS = 10_000
CHARS = (80, 400, 1600, 4000)
PATHS = ("scored",) * 7 + ("pinned",) * 2 + ("fast",)
POOL = 256  # different prompts; a new one is one of these after a new number


class Traffic:
    """An endless stream of request bodies and headers; equal arguments give equal streams."""

    def __init__(
        self,
        fleet: Fleet,
        seed: int,
        *,
        paths: Sequence[str] = PATHS,
        chars: Sequence[int] = CHARS,
    ) -> None:
        self._rng = rng = Random(seed)
        self._pool = [body(rng.choice(paths), rng.choice(chars), rng, fleet) for _ in range(POOL)]
        self._sent = 0

    def __iter__(self) -> Iterator[tuple[bytes, dict[str, str]]]:
        return self

    def __next__(self) -> tuple[bytes, dict[str, str]]:
        rng = self._rng
        raw = rng.choice(self._pool)
        if rng.random() < NEW_SHARE:
            self._sent += 1
            # At the beginning, so that every block of the prompt is new.
            raw = raw.replace(b'"content": "', b'"content": "%d ' % self._sent, 1)
        session = rng.random() < SESSION_SHARE
        return raw, {"x-session-id": f"s{rng.randrange(SESSIONS)}"} if session else {}


class Cluster:
    """The replicas of every SLM, each an engine with a queue; mean service time `service_s`."""

    def __init__(
        self, fleet: Fleet, replicas: Mapping[str, int], service_s: float, seed: int
    ) -> None:
        self.engines: dict[str, EngineSimulator] = {}
        self.states: dict[str, list[ReplicaState]] = {}
        for spec in fleet.slms:
            self.states[spec.id] = []
            for i in range(replicas[spec.id]):
                name = f"{spec.id}#{i:04}"
                self.engines[name] = EngineSimulator(
                    spec,
                    slots=SLOTS,
                    prefill_s_per_token=0.0,  # service times vary enough with the answers' lengths
                    tpot_s=service_s / OUTPUT_TOKENS,
                    jitter_ratio=0.2,
                    seed=seed + i,
                )
                self.states[spec.id].append(self.engines[name].replica(0.0, name))


@dataclass
class Record:
    """The measurements of one simulation, per request."""

    decide_ns: array[int] = field(default_factory=lambda: array("q"))
    choose_ns: array[int] = field(default_factory=lambda: array("q"))  # includes indexing it
    wait_s: array[float] = field(default_factory=lambda: array("d"))
    rejections: int = 0  # attempts at a full replica, after which the next one is tried
    overflows: int = 0  # requests for which every replica of the SLM was full


@dataclass(order=True)
class _Completion:
    at_s: float
    number: int
    router: RouterProcess = field(compare=False)
    decision: Decision = field(compare=False)
    replica_id: str = field(compare=False)
    served: Served = field(compare=False)
    tokens: int = field(compare=False)


class Simulation:
    """`routers` processes share `rate_rps` requests per second to one cluster."""

    def __init__(
        self,
        fleet: Fleet,
        predictor: Predictor,
        cluster: Cluster,
        *,
        routers: int,
        rate_rps: float,
        seed: int,
    ) -> None:
        self.clock = FakeClock(0.0)
        self.record = Record()
        self.routers = [
            RouterProcess(fleet, predictor, cluster.states, self.clock, Random(seed + i))
            for i in range(routers)
        ]
        self._cluster, self._rate_rps = cluster, rate_rps
        self._traffic = Traffic(fleet, seed)
        self._rng = Random(seed)
        self._completions: list[_Completion] = []
        self._number = 0

    def step(self) -> list[Outcome]:
        """Run every completion before the next arrival, then the arrival. Returns the outcomes."""
        now_s = self.clock.now_s + self._rng.expovariate(self._rate_rps)
        outcomes = []
        while self._completions and self._completions[0].at_s <= now_s:
            outcomes.append(self._end(heapq.heappop(self._completions)))
        self.clock.advance(now_s - self.clock.now_s)
        self._number += 1
        router = self._rng.choice(self.routers)
        raw, headers = next(self._traffic)
        start = thread_time_ns()
        decision = router.decide(raw, headers, f"d{self._number}")
        decided = thread_time_ns()
        ranking = router.rank(decision)
        self.record.choose_ns.append(thread_time_ns() - decided)
        self.record.decide_ns.append(decided - start)
        self._send(router, decision, [r for group in ranking for r in group])
        return outcomes

    def _send(self, router: RouterProcess, decision: Decision, order: list[str]) -> None:
        now_s, engines = self.clock.now_s, self._cluster.engines
        lengths: dict[str, int] = {}
        for replica_id in order:
            replica = engines[replica_id].replica(now_s)
            if replica.queue_length < replica.max_queue_length:
                chosen = replica_id
                lengths[replica_id] = replica.queue_length
                break
            # A rejection reports the queue length, which corrects the router's cache.
            router.queues.report(replica_id, replica.queue_length)
            lengths[replica_id] = replica.queue_length
            self.record.rejections += 1
        else:
            # Serve queues the request until a replica has room; the shortest queue is next.
            chosen = min(lengths, key=lambda r: (lengths[r], r))
            self.record.overflows += 1
        tokens = max(1, math.ceil(self._rng.expovariate(1.0 / OUTPUT_TOKENS)))
        served = engines[chosen].submit(now_s, decision.context.prompt_tokens, tokens)
        start = thread_time_ns()
        router.accepted(decision, chosen, lengths[chosen] + 1)
        self.record.choose_ns[-1] += thread_time_ns() - start
        self.record.wait_s.append(served.started_s - now_s)

        heapq.heappush(
            self._completions,
            _Completion(served.ended_s, self._number, router, decision, chosen, served, tokens),
        )

    def _end(self, completion: _Completion) -> Outcome:
        self.clock.advance(max(completion.at_s - self.clock.now_s, 0.0))
        served, context = completion.served, completion.decision.context
        load = self._cluster.engines[completion.replica_id].replica(completion.at_s)
        facts: EngineFacts = make_facts(
            completion.replica_id,
            prompt_tokens=context.prompt_tokens,
            output_tokens=completion.tokens,
            ttft_s=served.ttft_s,
            running=load.running,
            waiting=load.waiting,
        )
        outcome = make_outcome(
            completion.decision.decision_id,
            at=completion.at_s,
            slm_id=completion.decision.slm_id,
            path=str(completion.decision.path),
            reason=str(completion.decision.reason),
            replica_id=completion.replica_id,
            ttft_s=served.ttft_s,
            e2e_s=served.ended_s - served.arrived_s,
            tpot_s=(served.ended_s - served.first_token_s) / max(completion.tokens - 1, 1),
            output_tokens=completion.tokens,
            numbers=context.features.numbers,
            buckets=context.features.buckets,
        )
        completion.router.finished(outcome, facts)
        return outcome


def spread(
    fleet: Fleet, predictor: Predictor, replicas: int, seed: int, decisions: int = 400
) -> dict[str, int]:
    """Divide `replicas` among the SLMs by how often an idle fleet chooses them, at least one each.

    This is where autoscaling would converge; otherwise one SLM would be overloaded, others idle.
    """
    idle = Cluster(fleet, {s.id: 1 for s in fleet.slms}, 1.0, seed)
    router = RouterProcess(fleet, predictor, idle.states, FakeClock(0.0), Random(seed))
    traffic = Traffic(fleet, seed)
    counts = {s.id: 1.0 for s in fleet.slms}
    for number in range(decisions):
        counts[router.decide(*next(traffic), f"p{number}").slm_id] += 1.0
    total, left = sum(counts.values()), replicas - len(counts)
    if left < 0:
        raise ValueError(f"{replicas} replicas cannot hold {len(counts)} SLMs")
    shares = {i: 1 + int(left * c / total) for i, c in counts.items()}
    busiest = sorted(counts, key=lambda i: -counts[i] / shares[i])
    for position in range(replicas - sum(shares.values())):
        shares[busiest[position % len(busiest)]] += 1
    return shares
