"""Reports of an SLM replica to the knowledge actor: best effort, without waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import ray

from calm_serve.protocol.reports import (
    ENERGY_REPORT,
    REPLICA_REPORT,
    EnergyReport,
    ReplicaReport,
)
from deployments.knowledge.address import NAMESPACE, actor_name


class StateReporter:
    """Reports state and energy of one SLM replica; a report that is lost is not repeated."""

    def __init__(self, app_name: str, slm_id: str, replica_id: str) -> None:
        self._name = actor_name(app_name)
        self._slm_id = slm_id
        self._replica_id = replica_id

    def report(
        self, state: str, ready_s: Mapping[str, float] | None = None, detail: str = ""
    ) -> None:
        """Report a state; `ready_s` are the times of the phases so far, in seconds."""
        try:
            actor = ray.get_actor(self._name, namespace=NAMESPACE)
        except ValueError:
            return  # no knowledge actor: states are then visible in Serve's own status only
        report = ReplicaReport(state, dict(ready_s or {}), detail)
        actor.report_state.remote(self._slm_id, self._replica_id, REPLICA_REPORT.encode(report))

    def energy(self, report: EnergyReport) -> None:
        """Report the replica's energy so far; see `ReplicaEnergy.report`."""
        with contextlib.suppress(ValueError):  # no knowledge actor
            actor = ray.get_actor(self._name, namespace=NAMESPACE)
            actor.report_energy.remote(self._slm_id, self._replica_id, ENERGY_REPORT.encode(report))
