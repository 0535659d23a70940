"""Fleet view: the state of all SLMs as one router process knows it; `/v1/fleet` shows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from calm_serve.config import Fleet, SLMSpec
from calm_serve.protocol.reports import ReplicaReport
from calm_serve.protocol.topics import DesiredResidency, MonitorFindings, SLMEnergy
from calm_serve.telemetry import Alarms, BreakerState, ContentGainMonitor, FleetStats, ReplicaStats
from calm_serve.types import Decision, Outcome, PredictorVersion, ReplicaState, Residency, SLMState
from deployments.router.live_state import VIEW
from deployments.router.residency_view import ResidencyView
from deployments.wire import deployment_name

log = logging.getLogger("ray.serve")

NO_REPORT = ReplicaReport("")
CONSTANT = "constant_selector"  # kind of the alarm for choices that do not depend on the prompts
STATE_LIFETIME_S = 0.02  # a state is recomputed at most this often per SLM


class FleetView:
    """Live state of each SLM, from replica lists, replies and the knowledge actor's topics.

    Single-threaded. `ready`: every hot SLM has been up once; it never becomes false again. `clock`
    returns monotonic seconds; `on_failure` is called with each replica that reports a failure.
    """

    def __init__(
        self,
        fleet: Fleet,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[str], None] = lambda _replica_id: None,
    ) -> None:
        self.fleet = fleet
        self.ready = False
        self._clock, self._on_failure = clock, on_failure
        self._stats = FleetStats([s.id for s in fleet.slms], clock)
        self._states: dict[str, tuple[float, SLMState]] = {}
        self._reports: dict[str, ReplicaReport] = {}
        self._cool_until: dict[str, float] = {}  # SLM -> when it may get requests again
        self._seen_up: set[str] = set()
        self._replicas = ReplicaStats(clock)
        self.monitor = MonitorView()
        self.residency = ResidencyView()

    def set_fleet(self, fleet: Fleet) -> None:
        """Take the SLMs that joined or left."""
        before, after = {s.id for s in self.fleet.slms}, {s.id for s in fleet.slms}
        for slm_id in after - before:
            self._stats.add(slm_id)
        for slm_id in before - after:
            self._stats.remove(slm_id)
            self._states.pop(slm_id, None)
            self._seen_up.discard(slm_id)
            self._cool_until.pop(slm_id, None)
        self.fleet = fleet

    def set_reports(self, reports: Mapping[str, Mapping[str, ReplicaReport]]) -> None:
        """Take the replicas' reports, SLM to replica to report; the newest of an SLM is shown."""
        for slm_id, by_replica in reports.items():
            for replica_id, report in by_replica.items():
                if report.state == "failed":  # a failed replica does not recover; Serve replaces it
                    VIEW.died(deployment_name(slm_id), replica_id)
                    self._on_failure(replica_id)
        for slm_id, replica_id in self.residency.set_reports(reports):
            VIEW.estimator(deployment_name(slm_id)).emptied(replica_id)
        self._states.clear()
        self._reports = {
            slm_id: max(by_replica.values(), key=lambda r: r.at)
            for slm_id, by_replica in reports.items()
            if by_replica
        }
        for slm_id, report in self._reports.items():
            if report.state == "ready" and (start_s := report.ready_s.get("total")):
                self._stats.woke(
                    slm_id, start_s
                )  # from cold; wake-ups from sleep are timed separately

    def set_desired_residency(self, desired: DesiredResidency, revision: int) -> None:
        """Take the desired residency that the knowledge actor published."""
        self.residency.set_desired(desired, revision)
        self._states.clear()

    def set_findings(self, found: MonitorFindings) -> None:
        """Take the findings of the outcome monitor; see `MonitorView`."""
        self.monitor.set(found)
        self._stats.set_calibration_factors(self.monitor.calibration_factors)
        self._stats.set_unfamiliar_answers(found.unfamiliar_answers)
        self._states.clear()

    def set_predictor(self, version: PredictorVersion) -> None:
        """Take the version of the predictor in use; its errors are measured anew."""
        self._stats.set_predictor(version)
        self._states.clear()

    def state(self, spec: SLMSpec) -> SLMState:
        """The SLM's current state; takes microseconds, calls nothing remote."""
        now = self._clock()
        kept = self._states.get(spec.id)
        if kept is not None and now - kept[0] < STATE_LIFETIME_S:
            return kept[1]
        replicas = self._live(spec)
        state = self._stats.state(spec, replicas, now, self._absent(spec))
        state = self.residency.with_residency(state, replicas)
        if now < self._cool_until.get(spec.id, now):
            state = replace(state, breaker_open=True)
        self._states[spec.id] = (now, state)
        return state

    def observe(self, outcome: Outcome, took_s: float | None = None) -> None:
        """Feed the statistics and the circuit breaker; see `FleetStats.observe`."""
        if any(s.id == outcome.slm_id for s in self.fleet.slms):
            self._stats.observe(outcome, took_s)
            self._replicas.observe(outcome)

    def attempt_failed(self, slm_id: str, took_s: float = 0.0) -> None:
        """Count a replica that failed before its first byte, `took_s` after it got the request."""
        self._stats.attempt_failed(slm_id, took_s)
        self._states.pop(slm_id, None)

    def cool_down(self, slm_id: str, seconds: float) -> None:
        """Choose the SLM for no request for so long."""
        self._cool_until[slm_id] = self._clock() + seconds
        self._states.pop(slm_id, None)

    def has_replica(self, slm_id: str) -> bool:
        """Whether the SLM has a live replica now."""
        return bool(VIEW.replicas(deployment_name(slm_id)))

    def can_take(self, slm_id: str) -> bool:
        """Whether an SLM may be asked: it is in the fleet and not broken, and has a replica.

        An SLM that may go cold needs none: a request starts one.
        """
        spec = next((s for s in self.fleet.slms if s.id == slm_id), None)
        if spec is None or self.state(spec).breaker_open:
            return False
        return self.has_replica(slm_id) or spec.scaling.min_replicas == 0

    def refresh_ready(self) -> bool:
        """Re-evaluate and return readiness: every hot SLM has had a replica."""
        for spec in self.fleet.slms:
            if VIEW.replicas(deployment_name(spec.id)):
                self._seen_up.add(spec.id)
        hot = {s.id for s in self.fleet.slms if s.residency != "on_demand"}
        # An SLM that dies later is shown in /v1/fleet; the endpoint stays ready for the others.
        self.ready = self.ready or hot <= self._seen_up
        return self.ready

    def states(self) -> dict[str, str]:
        """The displayed state of each SLM, for `/health` and `calm fleet`."""
        return {s.id: self._state_name(s) for s in self.fleet.slms}

    def snapshot(self, predictor: Mapping[str, Any]) -> dict[str, Any]:
        """The `/v1/fleet` document."""
        return {
            "ready": self.refresh_ready(),
            "predictor": dict(predictor),
            **self.monitor.fleet(),
            **self._residency_summary(),
            "slms": [self._row(s) for s in self.fleet.slms],
        }

    def _residency_summary(self) -> dict[str, Any]:
        summary = self.residency.summary
        if not self.residency.active:
            return {}
        return {"residency": {} if summary is None else asdict(summary)}

    def _row(self, spec: SLMSpec) -> dict[str, Any]:
        state = self.state(spec)
        seen = self._stats.snapshot(spec.id, self._clock())
        report = self._reports.get(spec.id) or NO_REPORT
        replicas = self._live(spec)
        return {
            "id": spec.id,
            "state": self._state_name(spec),
            "locality": spec.locality,
            "task": str(spec.task),
            "skills": list(spec.skills),
            "replicas": state.replicas,
            "target_replicas": spec.scaling.min_replicas,
            "running": state.running,
            "waiting": state.waiting,
            "capacity": state.capacity,
            "kv_usage_ratio": state.kv_usage_ratio,
            "cached_prefix_ratio": state.cached_prefix_ratio,
            "memory_bytes": sum(r.memory_bytes for r in replicas),
            "ready_s": report.ready_s,
            "ttft_s": state.ttft_s,
            "tpot_s": seen.tpot_s,
            "ttft_p95_s": seen.ttft_p95_s,
            "tpot_p95_s": seen.tpot_p95_s,
            "e2e_p95_s": seen.e2e_p95_s,
            "queue_s": seen.queue_s,
            "output_tokens_per_s": seen.output_tokens_per_s,
            "energy_j_per_token": seen.energy_j_per_token,
            "energy_j_per_token_next": state.energy_j_per_token,
            "ttft_ratio": round(state.ttft_ratio, 3),
            "age_s": seen.age_s,
            "requests": seen.requests,
            "failures": seen.failures,
            "adapters": [a.name for a in spec.adapters],
            "resident_adapters": sorted({a for r in replicas for a in r.adapters}),
            "detail": report.detail,
            **self.monitor.row(spec.id),
            **self.residency.row(spec, state),
            "per_replica": [self._replica(r) for r in replicas],
        }

    def _live(self, spec: SLMSpec) -> tuple[ReplicaState, ...]:
        return self.residency.without_stale_load(VIEW.replicas(deployment_name(spec.id)))

    def _replica(self, replica: ReplicaState) -> dict[str, Any]:
        return {
            "replica_id": replica.replica_id,
            "node_id": replica.node_id,
            "running": replica.running,
            "waiting": replica.waiting,
            "kv_usage_ratio": replica.kv_usage_ratio,
            "cached_prefix_ratio": replica.cached_prefix_ratio,
            "memory_bytes": replica.memory_bytes,
            **self._replicas.row(replica.replica_id),
        }

    def _state_name(self, spec: SLMSpec) -> str:
        if VIEW.replicas(deployment_name(spec.id)):
            state = self.state(spec)
            # Half-open: a probe may be sent, but none has succeeded yet.
            closed = self._stats.breaker(spec.id) is BreakerState.CLOSED
            return str(state.residency) if closed else "degraded"
        if spec.id in self._seen_up and spec.residency != "on_demand":
            return str(Residency.DEAD)
        reported = (self._reports.get(spec.id) or NO_REPORT).state
        if reported not in (
            "",
            "ready",
            "asleep",
            "waking",
        ):  # the last three: of a replica that is gone
            return reported
        return str(Residency.COLD if spec.residency == "on_demand" else "pending")

    def _absent(self, spec: SLMSpec) -> Residency:
        if spec.id in self._seen_up and spec.residency != "on_demand":
            return Residency.DEAD
        return Residency.COLD if spec.residency == "on_demand" else Residency.STARTING


class MonitorView:
    """Findings of the outcome monitor over all routers, and of this router over its own choices.

    `clock` returns Unix time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._findings = MonitorFindings()
        self._energy: Mapping[str, SLMEnergy] = {}
        self._content_gain = ContentGainMonitor()
        self._alarms = Alarms(clock)

    @property
    def calibration_factors(self) -> Mapping[str, float]:
        """SLM -> factor on P(success); a missing SLM has the factor 1."""
        return self._findings.calibration_factors

    def set(self, findings: MonitorFindings) -> None:
        """Take the findings of the outcome monitor."""
        self._findings = findings

    def set_energy(self, energy: Mapping[str, SLMEnergy]) -> None:
        """Take the energy of each SLM."""
        self._energy = energy

    def chose(self, decision: Decision) -> None:
        """Count a decision of this router."""
        self._content_gain.observe(decision)

    def fleet(self) -> dict[str, Any]:
        """The fleet's part of `/v1/fleet`: alarms that are on, and the content gain."""
        gains = self._content_gain.gains()
        if gains is not None and (verdict := gains.verdict):
            if self._alarms.start(CONSTANT, "", gains.entropy_ratio, verdict):
                log.warning("choices do not depend on the prompts: %s", verdict)
        else:
            self._alarms.end(CONSTANT)
        return {
            "alarms": [asdict(a) for a in (*self._findings.alarms, *self._alarms.current())],
            "choices": {
                **(asdict(gains) if gains else {}),
                "calibration_error": self._findings.calibration_error,
                "unfamiliar_ratio": self._findings.unfamiliar_ratio,
            },
        }

    def row(self, slm_id: str) -> dict[str, Any]:
        """The SLM's part of `/v1/fleet`."""
        energy: dict[str, Any] = {}
        if (found := self._energy.get(slm_id)) is not None:
            energy = asdict(found)
            energy["age_s"] = round(max(self._clock() - energy.pop("at"), 0.0), 1)
        unfamiliar = self._findings.unfamiliar_answers.get(slm_id)
        return {
            "calibration_factor": self.calibration_factors.get(slm_id, 1.0),
            "unfamiliar_answers": unfamiliar and asdict(unfamiliar),
            "energy": energy,
        }
