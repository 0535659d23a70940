"""Residency as one router knows it: what was ordered, what replicas said, how long waking takes.

Without a memory budget nothing is ordered, and every SLM with a replica is hot.
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
    """Tiers of the fleet. Single-threaded; `state` is on the hot path."""

    def __init__(self) -> None:
        self.options = ResidencyOptions()
        self.summary: ResidencySummary | None = None
        self.waits: dict[str, float] = {}  # SLM -> seconds until it could answer
        self.version = 0  # revision of the desired residency
        self._ordered: dict[str, Residency] = {}
        self._reported: dict[str, str] = {}  # replica -> the state it reported
        self._wake_s: dict[str, float] = {}  # the last wake-up that a replica measured
        self._woke_in_s: dict[str, float] = {}  # the same, by replica
        self._changed = asyncio.Event()

    @property
    def active(self) -> bool:
        """Whether there is a memory budget."""
        return bool(self._ordered)

    def set_desired(self, desired: DesiredResidency, revision: int) -> None:
        """Take what the residency coordinator published; an SLM that is not named is to be hot."""
        self.version = revision
        self._ordered = dict(desired.tiers)
        self.options = desired.options
        if not self._ordered:
            self.summary, self.waits = None, {}
        self._changed.set()
        self._changed = asyncio.Event()

    def set_reports(
        self, reports: Mapping[str, Mapping[str, ReplicaReport]]
    ) -> list[tuple[str, str]]:
        """Take what replicas say, SLM to replica to report.

        Returns (SLM, replica) of those that have slept since the last time: their cache is gone.
        """
        before, self._reported, slept = self._reported, {}, []
        woke, self._woke_in_s = self._woke_in_s, {}
        for slm_id, by_replica in reports.items():
            for replica_id, report in by_replica.items():
                state = self._reported[replica_id] = report.state
                wake_s = report.ready_s.get("wake")
                if wake_s is not None:
                    self._wake_s[slm_id] = self._woke_in_s[replica_id] = wake_s
                # The board keeps the last report alone: another wake-up was another sleep too.
                if before.get(replica_id) not in _NOT_AWAKE and (
                    state in _NOT_AWAKE or wake_s != woke.get(replica_id)
                ):
                    slept.append((slm_id, replica_id))
        return slept

    def as_reported(self, replicas: tuple[ReplicaState, ...]) -> tuple[ReplicaState, ...]:
        """The replicas, those that sleep without the load of their last answers."""
        if not any(self._reported.get(r.replica_id) == "asleep" for r in replicas):
            return replicas
        return tuple(
            replace(r, running=0, waiting=0, queue_length=0, kv_usage_ratio=0.0)
            if self._reported.get(r.replica_id) == "asleep"
            else r
            for r in replicas
        )

    def ordered(self) -> dict[str, str]:
        """SLM to the tier that it was ordered to; {} without a memory budget."""
        return {slm_id: str(tier) for slm_id, tier in self._ordered.items()}

    def is_ordered_hot(self, slm_id: str) -> bool:
        """Whether the SLM may be sent requests: it is awake or has been told to wake."""
        return self._ordered.get(slm_id, Residency.HOT) is Residency.HOT

    async def until_ordered_hot(self, slm_id: str) -> None:
        """Return when the SLM may be sent requests."""
        while not self.is_ordered_hot(slm_id):
            await self._changed.wait()

    async def until_active(self) -> None:
        """Return when there is a memory budget."""
        while not self.active:
            await self._changed.wait()

    def state(self, state: SLMState, replicas: Sequence[ReplicaState]) -> SLMState:
        """The state with its residency, and with the time until it could answer as `wake_s`."""
        if not self._ordered or not replicas:
            return state
        slm_id = state.slm_id
        if not self.is_ordered_hot(slm_id):
            tier = Residency.ASLEEP
        elif all(self._reported.get(r.replica_id) in _NOT_AWAKE for r in replicas):
            tier = Residency.STARTING
        else:
            return state
        wake_s = self.waits.get(slm_id, self._wake_s.get(slm_id, state.wake_s))
        return replace(state, residency=tier, wake_s=min(wake_s, max(self.options.hold_s, 1.0)))

    def row(self, spec: SLMSpec, state: SLMState) -> dict[str, Any]:
        """What `/v1/fleet` says of one SLM."""
        return {
            "tier": str(state.residency),
            "wanted_tier": str(self._ordered.get(spec.id, Residency.HOT)),
            "declared_bytes": spec.declared_bytes,
            "wake_s": self._wake_s.get(spec.id),
        }
