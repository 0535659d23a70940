"""The effect of a stale load view: waiting, imbalance and requests sent to full replicas.

One SLM's replicas are engines with a queue. Router processes choose among them with the production
ranking and its estimator; their view of the load differs:

- `live_view`: the true load as of the last published snapshot, plus the process's own calls since.
  A snapshot is published every `age_s`, so it is half as old on average.
- `reports`: the snapshot alone, without the process's own calls.
- `served`: Ray Serve's cache, without snapshots: own calls, and replicas' reports with each call.
- `two`: the same cache, and the less loaded of two random replicas, as Ray Serve's own router.
- `least`: the replica with the least true load; `random`: any replica.

A full replica rejects, and the next one in the ranking is tried. `two`, `least` and `random` are
for comparison.
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

from calm_serve.replicas import FirstTokenEstimator, ReplicaRequest, rank_for_prompt
from calm_serve.testing import EngineSimulator, FakeClock, make_spec
from calm_serve.types import EngineFacts, ReplicaState
from load_tests.scale.router import QueueCache

AGES_S = (0.0, 0.01, 0.1, 1.0, 10.0)
ROUTERS = (1, 8, 64)
REPLICAS, SLOTS = 32, 8
SERVICE_S = 1.0
UTILISATION = 0.8
REQUESTS = 12_000  # about a minute of simulated time
WARM_SHARE = 0.2  # of the requests, left out, while queues build up
OUTPUT_TOKENS = 64.0
FAMILIES = 500  # repeated prompts, with Zipf's law; half of the requests have new prompts
SAMPLE_EVERY = 20  # arrivals between two samples of the imbalance


@dataclass(frozen=True)
class Setting:
    """One point of the curves: the view, its age, and the number of router processes."""

    policy: str  # live_view, reports, served, two, least or random
    age_s: float = 0.0
    routers: int = 1

    @property
    def name(self) -> str:
        """Prefix of its figures."""
        if self.policy in ("least", "random"):
            return f"staleness.{self.policy}"
        aged = f".{self.age_s * 1000:g}ms" if self.policy in ("live_view", "reports") else ""
        return f"staleness.{self.policy}.{self.routers}{aged}"


class Balance:
    """Requests on simulated time under one setting."""

    def __init__(self, setting: Setting, requests: int, seed: int) -> None:
        self._setting, self._requests = setting, requests
        self._rng = Random(seed)
        spec = make_spec(batching="interactive")
        self._limit = spec.limits.max_ongoing_requests
        self._engines = [
            EngineSimulator(
                spec, slots=SLOTS, prefill_s_per_token=0.0, tpot_s=SERVICE_S / OUTPUT_TOKENS
            )
            for _ in range(REPLICAS)
        ]
        self._names = [f"replica-{i:04}" for i in range(REPLICAS)]
        self._load = [0] * REPLICAS  # true load
        self._snapshot = [0] * REPLICAS  # true load at the last publication
        self._own_calls: dict[int, list[int]] = defaultdict(lambda: [0] * REPLICAS)  # since then
        self._clock = FakeClock(0.0)
        self._caches = [QueueCache(self._clock) for _ in range(setting.routers)]
        self._estimators = [FirstTokenEstimator(8192, self._clock) for _ in range(setting.routers)]
        for estimator in self._estimators:
            estimator.retain(self._names)
        self._completions: list[
            tuple[float, int, int, int, EngineFacts]
        ] = []  # time, replica, router
        self._snapshots = 0
        self._full = 0
        self._zipf = list(accumulate(1.0 / (i + 1) for i in range(FAMILIES)))

    def run(self) -> dict[str, float]:
        """The setting's figures."""
        rate_rps = UTILISATION * REPLICAS * SLOTS / SERVICE_S
        waits: list[float] = []
        peaks: list[float] = []
        for number in range(self._requests):
            self._advance(self._clock.now_s + self._rng.expovariate(rate_rps))
            waits.append(self._arrive(number))
            if number % SAMPLE_EVERY == 0:
                peaks.append(max(self._load) / max(sum(self._load) / REPLICAS, 1e-9))
        kept = np.array(waits[int(WARM_SHARE * len(waits)) :])
        return {
            "p99_wait_ms": round(float(np.quantile(kept, 0.99)) * 1000, 1),
            "mean_wait_ms": round(float(kept.mean()) * 1000, 2),
            "sent_to_full_share": round(self._full / self._requests, 4),
            "waiting_share": round(float((kept > 0).mean()), 4),
            "max_over_mean": round(float(np.mean(peaks[int(WARM_SHARE * len(peaks)) :])), 3),
        }

    def _advance(self, now_s: float) -> None:
        """Run completions up to `now_s`, publishing the true load on the way if it is time."""
        age_s = self._setting.age_s
        if age_s > 0.0 and int(now_s / age_s) > self._snapshots:
            self._snapshots = int(now_s / age_s)
            self._end(self._snapshots * age_s)
            self._snapshot = self._load.copy()
            self._own_calls.clear()
        self._end(now_s)
        self._clock.advance(now_s - self._clock.now_s)

    def _end(self, until_s: float) -> None:
        while self._completions and self._completions[0][0] <= until_s:
            at_s, replica, router, number, facts = heapq.heappop(self._completions)
            self._clock.advance(max(at_s - self._clock.now_s, 0.0))
            self._load[replica] -= 1
            self._own_calls[router][replica] -= 1
            self._caches[router].finished(self._names[replica])
            self._estimators[router].answered(str(number), facts)

    def _arrive(self, number: int) -> float:
        router = self._rng.randrange(self._setting.routers)
        key = self._family(number)
        replica = self._admitted(router, self._order(router, number, key))
        tokens = max(1, round(self._rng.expovariate(1.0 / OUTPUT_TOKENS)))
        served = self._engines[replica].submit(self._clock.now_s, 0, tokens)
        self._load[replica] += 1
        self._own_calls[router][replica] += 1
        self._caches[router].report(self._names[replica], self._load[replica])
        self._estimators[router].sent(
            str(number), (key,), 0, self._names[replica], self._load[replica]
        )
        wait_s = served.started_s - served.arrived_s
        facts = EngineFacts(
            replica_id=self._names[replica],
            prompt_tokens=1,
            output_tokens=tokens,
            queue_s=wait_s,
            ttft_s=wait_s + SERVICE_S / OUTPUT_TOKENS,
        )
        heapq.heappush(self._completions, (served.ended_s, replica, router, number, facts))
        return wait_s

    def _order(self, router: int, number: int, key: int) -> list[int]:
        if self._setting.policy == "random":
            return self._rng.sample(range(REPLICAS), REPLICAS)
        if self._setting.policy == "least":
            return sorted(range(REPLICAS), key=lambda i: (self._load[i], self._rng.random()))
        view = self._view(router)
        if self._setting.policy == "two":
            order = self._rng.sample(range(REPLICAS), REPLICAS)
            return sorted(order[:2], key=view.__getitem__) + order[2:]
        states = [
            ReplicaState(name, queue_length=length, max_queue_length=self._limit)
            for name, length in zip(self._names, view, strict=True)
        ]
        request = ReplicaRequest(str(number), prefix_family=f"{key:08x}")
        groups = rank_for_prompt(
            request, (key,), states, self._estimators[router], local_node_id="", random=self._rng
        )
        return [int(name[-4:]) for group in groups for name in group]

    def _view(self, router: int) -> Sequence[int]:
        policy = self._setting.policy
        if policy in ("served", "two"):
            return [self._caches[router].get(name) or 0 for name in self._names]
        if self._setting.age_s == 0.0:
            return self._load
        if policy == "reports":
            return self._snapshot
        own = self._own_calls[router]
        return [max(b + o, 0) for b, o in zip(self._snapshot, own, strict=True)]

    def _admitted(self, router: int, order: list[int]) -> int:
        """The first replica with room; those that reject report their queue lengths."""
        self._full += self._load[order[0]] >= self._limit
        for replica in order:
            if self._load[replica] < self._limit:
                return replica
            self._caches[router].report(self._names[replica], self._load[replica])
        return min(order, key=lambda i: self._load[i])

    def _family(self, number: int) -> int:
        if self._rng.random() < 0.5:
            return FAMILIES + number
        return bisect(self._zipf, self._rng.random() * self._zipf[-1])


def settings() -> list[Setting]:
    """Every point of the curves. At age 0 all processes have the same view, so one point suffices.

    Serve's cache has no fixed age: an entry is as old as the last call to its replica.
    """
    aged = [
        Setting(policy, age_s, routers)
        for policy in ("live_view", "reports")
        for age_s in AGES_S[1:]
        for routers in ROUTERS
    ]
    cached = [Setting(policy, 0.0, routers) for policy in ("served", "two") for routers in ROUTERS]
    return [Setting("least"), Setting("random"), Setting("live_view"), *cached, *aged]


def measure_staleness(requests: int, seed: int) -> dict[str, float]:
    """Figures of all settings; equal arguments give equal figures."""
    figures: dict[str, float] = {}
    for setting in tqdm(settings(), desc="staleness", unit="point"):
        found = Balance(setting, requests, seed).run()
        figures |= {f"{setting.name}.{key}": value for key, value in found.items()}
    return figures
