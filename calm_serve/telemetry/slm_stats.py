"""SLM statistics: recent latency, energy, rates and failures of each SLM in this process.

`FleetStats` is written by one event loop (a router's), once per finished request, and read once
per decision; it holds no lock and does no I/O. Its size is bounded by the number of SLMs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from calm_serve.config import SLMSpec
from calm_serve.protocol.topics import UnfamiliarAnswers
from calm_serve.telemetry.circuit_breaker import BreakerLimits, BreakerState, CircuitBreaker
from calm_serve.telemetry.residuals import SLMResiduals
from calm_serve.telemetry.statistics import DecayedRate, Ewma, QuantileWindow
from calm_serve.types import Outcome, PredictorVersion, ReplicaState, Residency, SLMState

Clock = Callable[[], float]

HALF_LIFE_S = 30.0  # of a mean: long against one answer, short against a change of load
WINDOW_SIZE = 256  # values behind each quantile
MAX_AGE_S = 300.0
NO_ANSWERS = UnfamiliarAnswers(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class SLMStatsSnapshot:
    """One SLM's recent past. Means and quantiles are None before the first observation."""

    slm_id: str
    ttft_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    tpot_s: float | None
    tpot_p95_s: float | None
    e2e_s: float | None
    e2e_p95_s: float | None
    queue_s: float | None
    energy_j_per_token: float | None
    output_tokens_per_s: float
    requests_per_s: float
    failure_ratio: float
    consecutive_failures: int
    breaker: BreakerState
    requests: int  # since the process started
    failures: int
    cold_starts: int
    wake_s: float | None  # last measured time from start to ready
    age_s: float  # since the last outcome, or since the start


class SLMStats:
    """Recent outcomes of one SLM; their weights halve every HALF_LIFE_S."""

    def __init__(
        self,
        slm_id: str,
        clock: Clock,
        limits: BreakerLimits | None = None,
        *,
        champion: str | None = None,
    ) -> None:
        now = clock()
        self._clock = clock
        self._slm_id = slm_id
        self._seen_at = now
        self._requests = self._failures = self._cold_starts = 0
        self._queue_s = Ewma(HALF_LIFE_S)
        self._ttft, self._tpot, self._e2e = (_Latency() for _ in range(3))
        self._energy_j_per_token = Ewma(HALF_LIFE_S)
        self._output_tokens = DecayedRate(HALF_LIFE_S, now)
        self._arrivals = DecayedRate(HALF_LIFE_S, now)
        self._breaker = CircuitBreaker(limits or BreakerLimits())
        self._replica_ids: frozenset[str] = frozenset()  # at the last call of `state`
        self.residuals = SLMResiduals(champion)
        self.wake_s: float | None = None
        self.calibration_factor = 1.0
        self.unfamiliar = NO_ANSWERS

    def observe(self, outcome: Outcome, took_s: float | None = None) -> None:
        """Count one finished request (any status); see `FleetStats.observe`."""
        now = self._clock()
        self._seen_at = now
        self._requests += 1
        self._arrivals.add(1.0, now)
        took_s = outcome.timing.e2e_s if took_s is None else took_s
        self._count_attempt(outcome, now, now - (took_s or 0.0))
        self._cold_starts += outcome.timing.cold
        self.residuals.observe(outcome)
        # The wait for a cold start is predicted from `wake_s`. If the mean included it, the SLM
        # would look slow for minutes after its wake-up.
        if outcome.timing.ttft_s is not None and not outcome.timing.cold:
            self._ttft.add(outcome.timing.ttft_s, now)
        if outcome.timing.tpot_s is not None:
            self._tpot.add(outcome.timing.tpot_s, now)
        if outcome.timing.e2e_s is not None and outcome.status == "ok" and not outcome.timing.cold:
            self._e2e.add(outcome.timing.e2e_s, now)
        if outcome.engine.queue_s is not None:
            self._queue_s.add(outcome.engine.queue_s, now)
        if outcome.engine.output_tokens > 0:
            self._output_tokens.add(outcome.engine.output_tokens, now)
            if outcome.engine.energy_j is not None:
                per_token = outcome.engine.energy_j / outcome.engine.output_tokens
                self._energy_j_per_token.add(per_token, now, weight=outcome.engine.output_tokens)

    def attempt_failed(self, took_s: float) -> None:
        """Count an attempt that failed before its first byte and was served elsewhere."""
        now = self._clock()
        self._failures += 1
        self._breaker.record(True, now, now - took_s)

    def breaker(self, now: float) -> BreakerState:
        """The circuit breaker's state at `now`."""
        return self._breaker.state(now)

    def snapshot(self, now: float) -> SLMStatsSnapshot:
        """Return all statistics at `now`; sorts, so not for the hot path."""
        ttft_p50, ttft_p95 = self._ttft.window.quantiles((0.5, 0.95), now)
        return SLMStatsSnapshot(
            slm_id=self._slm_id,
            ttft_s=self._ttft.recent.mean,
            ttft_p50_s=ttft_p50,
            ttft_p95_s=ttft_p95,
            tpot_s=self._tpot.recent.mean,
            tpot_p95_s=self._tpot.window.quantiles((0.95,), now)[0],
            e2e_s=self._e2e.recent.mean,
            e2e_p95_s=self._e2e.window.quantiles((0.95,), now)[0],
            queue_s=self._queue_s.mean,
            energy_j_per_token=self._energy_j_per_token.mean,
            output_tokens_per_s=self._output_tokens.per_s(now),
            requests_per_s=self._arrivals.per_s(now),
            failure_ratio=self._breaker.failure_ratio,
            consecutive_failures=self._breaker.consecutive,
            breaker=self._breaker.state(now),
            requests=self._requests,
            failures=self._failures,
            cold_starts=self._cold_starts,
            wake_s=self.wake_s,
            age_s=max(now - self._seen_at, 0.0),
        )

    def state(
        self,
        spec: SLMSpec,
        replicas: Sequence[ReplicaState],
        now: float,
        absent: Residency,
        elsewhere: int = 0,
    ) -> SLMState:
        """Return the live state; see `FleetStats.state`."""
        self._follow_replicas(replicas, now)
        running, waiting = _load(replicas, spec.limits.max_num_seqs)
        sent = sum(r.queue_length for r in replicas)
        count = max(len(replicas), 1)
        inside = running + waiting
        residuals = self.residuals
        per_token = residuals.energy.next_j(inside / count)
        log_in_flight = math.log(elsewhere + inside + 1)
        tpot_s = self._tpot.recent.mean
        if residuals.tpot.answers:
            tpot_s = math.exp(residuals.tpot.log_at(log_in_flight))
        return SLMState(
            slm_id=self._slm_id,
            residency=Residency.HOT if replicas else absent,
            replicas=len(replicas),
            running=running,
            waiting=waiting,
            capacity=spec.limits.max_num_seqs * len(replicas),
            kv_usage_ratio=sum(r.kv_usage_ratio for r in replicas) / count,
            cached_prefix_ratio=sum(r.cached_prefix_ratio for r in replicas) / count,
            ttft_s=self._ttft.recent.mean,
            tpot_s=tpot_s,
            energy_j_per_token=self._energy_j_per_token.mean if per_token is None else per_token,
            failure_ratio=self._breaker.failure_ratio,
            breaker_open=self._breaker.blocks(now, sent),
            wake_s=spec.wake_s(self.wake_s),
            age_s=max(now - self._seen_at, 0.0),
            calibration_factor=self.calibration_factor,
            unfamiliar_answers=self.unfamiliar.answers,
            unfamiliar_quality=self.unfamiliar.quality,
            in_flight=elsewhere + inside,
            ttft_ratio=residuals.ttft.at(log_in_flight),
            ttft_spread=residuals.ttft.spread,
            e2e_spread=residuals.e2e.spread,
        )

    def _follow_replicas(self, replicas: Sequence[ReplicaState], now: float) -> None:
        ids = frozenset(r.replica_id for r in replicas)
        if not self._replica_ids <= ids:
            # Failures are counted per SLM, not per replica, so it is unknown how many of them came
            # from the replicas that have gone. The breaker therefore forgets all of them.
            self._breaker.restart(now)
        self._replica_ids = ids

    def _count_attempt(self, outcome: Outcome, now: float, sent_at: float) -> None:
        # A cancelled request, a full queue and a malformed request are no evidence about the SLM.
        if outcome.status == "error" and not 400 <= outcome.http_status < 500:
            self._failures += 1
            self._breaker.record(True, now, sent_at)
        elif outcome.status == "ok":
            self._breaker.record(False, now, sent_at)


class FleetStats:
    """One `SLMStats` per SLM of the fleet."""

    def __init__(self, slm_ids: Iterable[str], clock: Clock) -> None:
        self._clock = clock
        self._windows = {slm_id: SLMStats(slm_id, clock) for slm_id in slm_ids}
        self._inside: dict[str, int] = {}  # SLM -> its requests at the last call of `state`
        self._in_flight = 0
        self._champion: str | None = None

    @property
    def slm_ids(self) -> tuple[str, ...]:
        """Ids of the observed SLMs."""
        return tuple(self._windows)

    def add(self, slm_id: str) -> None:
        """Observe an SLM from now on; if it is observed already, it keeps its statistics."""
        if slm_id not in self._windows:
            self._windows[slm_id] = SLMStats(slm_id, self._clock, champion=self._champion)

    def remove(self, slm_id: str) -> None:
        """Drop an SLM; its later outcomes are ignored."""
        self._windows.pop(slm_id, None)
        self._in_flight -= self._inside.pop(slm_id, 0)

    def observe(self, outcome: Outcome, took_s: float | None = None) -> None:
        """Count one finished request; an SLM that is not observed is ignored.

        `took_s` is the time since the request was sent to the SLM, which may be less than
        `e2e_s`: it may have waited, or failed elsewhere, before. None: `e2e_s` is used.
        """
        if found := self._windows.get(outcome.slm_id):
            found.observe(outcome, took_s)

    def attempt_failed(self, slm_id: str, took_s: float = 0.0) -> None:
        """Count an attempt at `slm_id`, sent `took_s` ago, that failed before an answer.

        The outcome names only the SLM that answered, so the breaker learns of the others here.
        """
        if window := self._windows.get(slm_id):
            window.attempt_failed(took_s)

    def breaker(self, slm_id: str) -> BreakerState:
        """The state of an SLM's circuit breaker; KeyError when it is not observed."""
        return self._windows[slm_id].breaker(self._clock())

    def woke(self, slm_id: str, wake_s: float) -> None:
        """Take a measured time from start to ready, in seconds."""
        if window := self._windows.get(slm_id):
            window.wake_s = wake_s

    def set_predictor(self, version: PredictorVersion) -> None:
        """Take the version of the predictor in use; see `SLMResiduals.set_champion`."""
        self._champion = version.champion
        for window in self._windows.values():
            window.residuals.set_champion(version.champion)

    def set_calibration_factors(self, factors: Mapping[str, float]) -> None:
        """Set the factor on P(success) of each SLM; 1 for one that is not named."""
        for slm_id, window in self._windows.items():
            window.calibration_factor = factors.get(slm_id, 1.0)

    def set_unfamiliar_answers(self, answers: Mapping[str, UnfamiliarAnswers]) -> None:
        """Set the quality on unfamiliar prompts of each SLM; unknown for one that is not named."""
        for slm_id, window in self._windows.items():
            window.unfamiliar = answers.get(slm_id, NO_ANSWERS)

    def state(
        self,
        spec: SLMSpec,
        replicas: Sequence[ReplicaState],
        now: float,
        absent: Residency = Residency.COLD,
    ) -> SLMState:
        """Aggregate the replicas and the statistics of `spec`; cheap, called for every decision.

        Load is the larger of what the engines reported and what this process has sent: an engine
        reports on its last chunk, so a burst that was just sent is visible only here. The caller
        removes outdated engine reports.

        Args:
            spec: the SLM; one that is not observed yet is added.
            replicas: the replicas that can answer now. When one has gone since the last call, the
                circuit breaker starts anew.
            now: seconds on the clock of this object.
            absent: residency to report when there are no replicas.
        """
        self.add(spec.id)
        before = self._inside.get(spec.id, 0)
        elsewhere = self._in_flight - before
        state = self._windows[spec.id].state(spec, replicas, now, absent, elsewhere)
        self._in_flight = state.in_flight
        self._inside[spec.id] = state.running + state.waiting
        return state

    def snapshot(self, slm_id: str, now: float) -> SLMStatsSnapshot:
        """Return one SLM's recent past; KeyError when it is not observed."""
        return self._windows[slm_id].snapshot(now)


class _Latency:
    """A decayed mean for decisions, and quantiles for display."""

    __slots__ = ("recent", "window")

    def __init__(self) -> None:
        self.recent = Ewma(HALF_LIFE_S)
        self.window = QuantileWindow(WINDOW_SIZE, MAX_AGE_S)

    def add(self, value_s: float, now: float) -> None:
        self.recent.add(value_s, now)
        self.window.add(value_s, now)


def _load(replicas: Sequence[ReplicaState], slots: int) -> tuple[int, int]:
    running = waiting = 0
    for replica in replicas:
        unreported = max(replica.queue_length - replica.running - replica.waiting, 0)
        started = min(unreported, max(slots - replica.running, 0))
        running += replica.running + started
        waiting += replica.waiting + unreported - started
    return running, waiting
