"""What an old view of the load costs: waiting, imbalance and requests sent to full replicas.

One SLM's replicas are engines with a queue. Router processes choose among them with the served
ranking and prefix index; what they know of the load differs:

- `board`: the true load as of the last board, plus each process's own calls since. A board appears
  every `age_s`, so the view is half of that old on average.
- `reports`: the board alone, so that a process forgets its own calls.
- `served`: Ray Serve's cache, without any board: own calls, and what replicas say when asked.
- `two`: the same cache, and the less loaded of two random replicas: Ray Serve's own router.
- `least`: the true least loaded replica; `random`: any replica.

A full replica rejects, and the next in the ranking is asked. The last three are for comparison.
"""

from __future__ import annotations

import heapq
from bisect import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import numpy as np
from tqdm import tqdm

from calm_serve.replicas import PrefixIndex, ReplicaRequest, rank_for_prompt
from calm_serve.testing import EngineSimulator, FakeClock, make_spec
from calm_serve.types import ReplicaState
from load_tests.scale.router import QueueCache

AGES_S = (0.0, 0.01, 0.1, 1.0, 10.0)
ROUTERS = (1, 8, 64)
REPLICAS, SLOTS = 32, 8
SERVICE_S = 1.0
UTILISATION = 0.8
REQUESTS = 12_000  # about a minute of simulated time
WARM_SHARE = 0.2  # left out: queues have to form first
TOKENS = 64.0
FAMILIES = 500  # prompts that come again, by Zipf's law; half of the requests are new ones
SAMPLE_EVERY = 20  # arrivals between two looks at the imbalance


@dataclass(frozen=True)
class Setting:
    """One point: who knows what."""

    policy: str  # board, reports, served, two, least or random
    age_s: float = 0.0
    routers: int = 1

    @property
    def name(self) -> str:
        """Prefix of its figures."""
        if self.policy in ("least", "random"):
            return f"staleness.{self.policy}"
        aged = f".{self.age_s * 1000:g}ms" if self.policy in ("board", "reports") else ""
        return f"staleness.{self.policy}.{self.routers}{aged}"


class Balance:
    """Requests over simulated time under one setting."""

    def __init__(self, setting: Setting, requests: int, seed: int) -> None:
        self._setting, self._requests = setting, requests
        self._rng = Random(seed)
        spec = make_spec(batching="interactive")
        self._limit = spec.limits.max_ongoing_requests
        self._engines = [
            EngineSimulator(spec, slots=SLOTS, prefill_s_per_token=0.0, tpot_s=SERVICE_S / TOKENS)
            for _ in range(REPLICAS)
        ]
        self._names = [f"replica-{i:04}" for i in range(REPLICAS)]
        self._inside = [0] * REPLICAS  # the truth
        self._board = [0] * REPLICAS
        self._own: dict[int, list[int]] = defaultdict(lambda: [0] * REPLICAS)  # since the board
        self._clock = FakeClock(0.0)
        self._caches = [QueueCache(self._clock) for _ in range(setting.routers)]
        self._indexes = [PrefixIndex(65_536) for _ in range(setting.routers)]
        self._endings: list[tuple[float, int, int]] = []  # time, replica, router
        self._boards = 0
        self._full = 0
        self._zipf = list(accumulate(1.0 / (i + 1) for i in range(FAMILIES)))

    def play(self) -> dict[str, float]:
        """The setting's figures."""
        rate_rps = UTILISATION * REPLICAS * SLOTS / SERVICE_S
        waits: list[float] = []
        peaks: list[float] = []
        for number in range(self._requests):
            self._advance(self._clock.now_s + self._rng.expovariate(rate_rps))
            waits.append(self._arrive(number))
            if number % SAMPLE_EVERY == 0:
                peaks.append(max(self._inside) / max(sum(self._inside) / REPLICAS, 1e-9))
        kept = np.array(waits[int(WARM_SHARE * len(waits)) :])
        return {
            "p99_wait_ms": round(float(np.quantile(kept, 0.99)) * 1000, 1),
            "mean_wait_ms": round(float(kept.mean()) * 1000, 2),
            "sent_to_full_share": round(self._full / self._requests, 4),
            "waiting_share": round(float((kept > 0).mean()), 4),
            "max_over_mean": round(float(np.mean(peaks[int(WARM_SHARE * len(peaks)) :])), 3),
        }

    def _advance(self, now_s: float) -> None:
        """Play endings up to `now_s`, and look at the true load at the last board before it."""
        age_s = self._setting.age_s
        if age_s > 0.0 and int(now_s / age_s) > self._boards:
            self._boards = int(now_s / age_s)
            self._end(self._boards * age_s)
            self._board = self._inside.copy()
            self._own.clear()
        self._end(now_s)
        self._clock.advance(now_s - self._clock.now_s)

    def _end(self, until_s: float) -> None:
        while self._endings and self._endings[0][0] <= until_s:
            at_s, replica, router = heapq.heappop(self._endings)
            self._clock.advance(max(at_s - self._clock.now_s, 0.0))
            self._inside[replica] -= 1
            self._own[router][replica] -= 1
            self._caches[router].finished(self._names[replica])

    def _arrive(self, number: int) -> float:
        router = self._rng.randrange(self._setting.routers)
        key = self._family(number)
        replica = self._admitted(router, self._order(router, number, key))
        tokens = max(1, round(self._rng.expovariate(1.0 / TOKENS)))
        served = self._engines[replica].submit(self._clock.now_s, 0, tokens)
        self._inside[replica] += 1
        self._own[router][replica] += 1
        self._caches[router].heard(self._names[replica], self._inside[replica])
        self._indexes[router].add((key,), self._names[replica])
        heapq.heappush(self._endings, (served.ended_s, replica, router))
        return served.started_s - served.arrived_s

    def _order(self, router: int, number: int, key: int) -> list[int]:
        if self._setting.policy == "random":
            return self._rng.sample(range(REPLICAS), REPLICAS)
        if self._setting.policy == "least":
            return sorted(range(REPLICAS), key=lambda i: (self._inside[i], self._rng.random()))
        believed = self._believed(router)
        if self._setting.policy == "two":
            order = self._rng.sample(range(REPLICAS), REPLICAS)
            return sorted(order[:2], key=believed.__getitem__) + order[2:]
        states = [
            ReplicaState(name, queue_length=length, max_queue_length=self._limit)
            for name, length in zip(self._names, believed, strict=True)
        ]
        request = ReplicaRequest(str(number), prefix_family=f"{key:08x}")
        groups = rank_for_prompt(
            request, (key,), states, self._indexes[router], local_node_id="", random=self._rng
        )
        return [int(name[-4:]) for group in groups for name in group]

    def _believed(self, router: int) -> Sequence[int]:
        policy = self._setting.policy
        if policy in ("served", "two"):
            return [self._caches[router].get(name) or 0 for name in self._names]
        if self._setting.age_s == 0.0:
            return self._inside
        if policy == "reports":
            return self._board
        own = self._own[router]
        return [max(b + o, 0) for b, o in zip(self._board, own, strict=True)]

    def _admitted(self, router: int, order: list[int]) -> int:
        """The first that is not full; whoever rejects says how many requests it has."""
        self._full += self._inside[order[0]] >= self._limit
        for replica in order:
            if self._inside[replica] < self._limit:
                return replica
            self._caches[router].heard(self._names[replica], self._inside[replica])
        return min(order, key=lambda i: self._inside[i])

    def _family(self, number: int) -> int:
        if self._rng.random() < 0.5:
            return FAMILIES + number
        return bisect(self._zipf, self._rng.random() * self._zipf[-1])


def settings() -> list[Setting]:
    """Every point of the curves. At age 0 all processes see the same, so one point stands for all.

    Serve's cache has no age of its own: its entries are as old as the last call to the replica.
    """
    aged = [
        Setting(policy, age_s, routers)
        for policy in ("board", "reports")
        for age_s in AGES_S[1:]
        for routers in ROUTERS
    ]
    cached = [Setting(policy, 0.0, routers) for policy in ("served", "two") for routers in ROUTERS]
    return [Setting("least"), Setting("random"), Setting("board"), *cached, *aged]


def measure_staleness(requests: int, seed: int) -> dict[str, float]:
    """Figures of all settings, the same for the same arguments."""
    figures: dict[str, float] = {}
    for setting in tqdm(settings(), desc="staleness", unit="point"):
        found = Balance(setting, requests, seed).play()
        figures |= {f"{setting.name}.{key}": value for key, value in found.items()}
    return figures
