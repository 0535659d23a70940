"""Residency as one router sees it: desired tiers, reported states, and times of wake-ups.

Without a memory budget there is no desired residency, and every SLM with a replica is hot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from calm_serve.config import ResidencyOptions, SLMSpec
from calm_serve.protocol.reports import ReplicaReport, ResidencySummary
from calm_serve.protocol.topics import DesiredResidency
from calm_serve.types import ReplicaState, Residency, SLMState

_NOT_AWAKE = ("asleep", "waking")


class ResidencyView:
    """Desired and reported residency of the fleet. Single-threaded.

    `with_residency` and `is_desired_hot` are on the hot path.
    """

    def __init__(self) -> None:
        self.options = ResidencyOptions()
        self.summary: ResidencySummary | None = None
        self.wait_s: dict[str, float] = {}  # SLM -> seconds until it could answer
        self.revision = 0  # of the desired residency, as published
        self._desired: dict[str, Residency] = {}
        self._reported: dict[str, str] = {}  # replica -> the state it reported
        self._wake_s: dict[str, float] = {}  # SLM -> its last measured wake-up
        self._replica_wake_s: dict[str, float] = {}  # the same, by replica
        self._changed = asyncio.Event()

    @property
    def active(self) -> bool:
        """Whether there is a memory budget."""
        return bool(self._desired)

    def set_desired(self, published: DesiredResidency, revision: int) -> None:
        """Take what the residency coordinator published; an SLM that it leaves out is hot."""
        self.revision = revision
        self._desired, self.options = dict(published.tiers), published.options
        if not self._desired:
            self.summary, self.wait_s = None, {}
        self._changed.set()
        self._changed = asyncio.Event()

    def set_reports(
        self, reports: Mapping[str, Mapping[str, ReplicaReport]]
    ) -> list[tuple[str, str]]:
        """Take the replicas' last reports, SLM to replica to report.

        Returns (SLM, replica) of those that have slept since the last call: their prefix cache is
        empty.
        """
        before, self._reported, slept = self._reported, {}, []
        wake_s_before, self._replica_wake_s = self._replica_wake_s, {}
        for slm_id, by_replica in reports.items():
            for replica_id, report in by_replica.items():
                state = self._reported[replica_id] = report.state
                wake_s = report.ready_s.get("wake")
                if wake_s is not None:
                    self._wake_s[slm_id] = self._replica_wake_s[replica_id] = wake_s
                # Only last reports are published. A new wake-up time shows a sleep in between.
                if before.get(replica_id) not in _NOT_AWAKE and (
                    state in _NOT_AWAKE or wake_s != wake_s_before.get(replica_id)
                ):
                    slept.append((slm_id, replica_id))
        return slept

    def without_stale_load(self, replicas: tuple[ReplicaState, ...]) -> tuple[ReplicaState, ...]:
        """The replicas, without the load of sleeping ones, which is of their last answers."""
        if not any(self._reported.get(r.replica_id) == "asleep" for r in replicas):
            return replicas
        return tuple(
            replace(r, running=0, waiting=0, queue_length=0, kv_usage_ratio=0.0)
            if self._reported.get(r.replica_id) == "asleep"
            else r
            for r in replicas
        )

    def desired(self) -> dict[str, str]:
        """SLM to its desired tier; {} without a memory budget."""
        return {slm_id: str(residency) for slm_id, residency in self._desired.items()}

    def is_desired_hot(self, slm_id: str) -> bool:
        """Whether the SLM may be sent requests: it is awake or is to wake."""
        return self._desired.get(slm_id, Residency.HOT) is Residency.HOT

    async def until_desired_hot(self, slm_id: str) -> None:
        """Return when the SLM may be sent requests."""
        while not self.is_desired_hot(slm_id):
            await self._changed.wait()

    async def until_active(self) -> None:
        """Return when there is a memory budget."""
        while not self.active:
            await self._changed.wait()

    def with_residency(self, state: SLMState, replicas: Sequence[ReplicaState]) -> SLMState:
        """The state with its residency, and with the time until it could answer as `wake_s`."""
        if not self._desired or not replicas:
            return state
        slm_id = state.slm_id
        if not self.is_desired_hot(slm_id):
            residency = Residency.ASLEEP
        elif all(self._reported.get(r.replica_id) in _NOT_AWAKE for r in replicas):
            residency = Residency.STARTING
        else:
            return state
        wake_s = self.wait_s.get(slm_id, self._wake_s.get(slm_id, state.wake_s))
        longest_s = max(self.options.hold_s, 1.0)
        return replace(state, residency=residency, wake_s=min(wake_s, longest_s))

    def row(self, spec: SLMSpec, state: SLMState) -> dict[str, Any]:
        """The SLM's part of `/v1/fleet`."""
        return {
            "tier": str(state.residency),
            "desired_tier": str(self._desired.get(spec.id, Residency.HOT)),
            "declared_bytes": spec.declared_bytes,
            "wake_s": self._wake_s.get(spec.id),
        }
