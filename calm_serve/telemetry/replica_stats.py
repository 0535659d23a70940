"""Replica statistics: recent outcomes of each replica, which show a slow or failing one.

They cover this router's own requests; `age_s` is the time since the newest one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from calm_serve.telemetry.slm_stats import HALF_LIFE_S, MAX_AGE_S
from calm_serve.telemetry.statistics import DecayedRate, Ewma, QuantileWindow
from calm_serve.types import Outcome

MAX_REPLICAS = 512  # the least recently used are dropped, because replicas come and go
REPLICA_WINDOW_SIZE = 128  # values behind each quantile


class _Replica:
    def __init__(self, now: float) -> None:
        self.requests = self.failures = 0
        self.seen_at = now
        self.means = {
            name: Ewma(HALF_LIFE_S)
            for name in ("ttft_s", "tpot_s", "queue_s", "energy_j_per_token", "signal_ratio")
        }
        self.p95 = {
            name: QuantileWindow(REPLICA_WINDOW_SIZE, MAX_AGE_S) for name in ("ttft_s", "tpot_s")
        }
        self.tokens = DecayedRate(HALF_LIFE_S, now)


class ReplicaStats:
    """Recent outcomes by replica; bounded, single-threaded. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._replicas: OrderedDict[str, _Replica] = OrderedDict()

    def observe(self, outcome: Outcome) -> None:
        """Count a finished request; ignored when no replica served it."""
        if not outcome.engine.replica_id:
            return
        now = self._clock()
        replica = self._replicas.get(outcome.engine.replica_id)
        if replica is None:
            replica = self._replicas[outcome.engine.replica_id] = _Replica(now)
        self._replicas.move_to_end(outcome.engine.replica_id)
        if len(self._replicas) > MAX_REPLICAS:
            self._replicas.popitem(last=False)
        replica.seen_at = now
        replica.requests += 1
        replica.failures += outcome.status == "error"
        tokens = outcome.engine.output_tokens
        replica.tokens.add(tokens, now)
        values = {
            "ttft_s": None if outcome.timing.cold else outcome.timing.ttft_s,
            "tpot_s": outcome.timing.tpot_s,
            "queue_s": outcome.engine.queue_s,
        }
        for name, value in values.items():
            if value is not None:
                replica.means[name].add(value, now)
                if name in replica.p95:
                    replica.p95[name].add(value, now)
        if outcome.engine.energy_j is not None and tokens > 0:
            replica.means["energy_j_per_token"].add(
                outcome.engine.energy_j / tokens, now, weight=tokens
            )
        for signal in outcome.signals:
            replica.means["signal_ratio"].add(signal.value, now)

    def row(self, replica_id: str) -> dict[str, Any]:
        """Means, p95, counts and `age_s` of one replica; {} when this router never used it."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return {}
        now = self._clock()
        return {
            **{name: mean.mean for name, mean in replica.means.items()},
            "ttft_p95_s": replica.p95["ttft_s"].quantiles((0.95,), now)[0],
            "tpot_p95_s": replica.p95["tpot_s"].quantiles((0.95,), now)[0],
            "output_tokens_per_s": replica.tokens.per_s(now),
            "requests": replica.requests,
            "failures": replica.failures,
            "age_s": max(now - replica.seen_at, 0.0),
        }
