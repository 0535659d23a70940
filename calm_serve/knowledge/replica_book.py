"""Replicas as the residency desk knows them: what they report, where they run, what they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from calm_serve.config import SLMSpec
from calm_serve.plan.occupancy import OCCUPYING, Occupant
from calm_serve.types import Residency

GONE_AFTER_S = 1.5  # a replica that no router has seen for so long, two looks, has died
START_PATIENCE_S = 600.0  # a replica that no router has seen yet may take so long
# A replica that Serve owes is believed to be on its way for so long; then it cannot be started.
OWED_PATIENCE_S = 60.0
MAX_REPLICAS = 4096

_STATES = {
    "ready": Residency.HOT,
    "waking": Residency.STARTING,
    "importing": Residency.STARTING,  # takes its memory within seconds
    "starting engine": Residency.STARTING,
    "warming up": Residency.STARTING,
    "asleep": Residency.ASLEEP,
}
_SETTLED = (Residency.HOT, Residency.ASLEEP)
_ORDER = (Residency.HOT, Residency.STARTING, Residency.ASLEEP)


@dataclass(slots=True)
class _Replica:
    slm_id: str
    tier: Residency
    heard_at: float
    reported: bool = False
    seen_at: float | None = None  # by a router
    node: str = ""


class ReplicaBook:
    """Every replica of the fleet, those that were ordered and have not spoken yet included."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._owed_since: dict[str, float] = {}  # SLM that has fewer replicas than it should

    def seen(self, slm_id: str, replica_id: str, node: str, now: float) -> None:
        """A router sees the replica. One that is not known, as after a restart, counts as hot."""
        replica = self._of(slm_id, replica_id, Residency.HOT, now)
        replica.seen_at, replica.node = now, node

    def reported(self, slm_id: str, replica_id: str, state: str, now: float) -> Residency:
        """The replica says what it does; returns the tier that this is."""
        replica = self._of(slm_id, replica_id, Residency.COLD, now)
        replica.tier, replica.reported = _STATES.get(state, Residency.COLD), True
        replica.heard_at = now
        return replica.tier

    def forget(self, last_look: float) -> None:
        """Drop replicas that routers saw and see no more; the last of them looked at that time."""
        for replica_id, replica in list(self._replicas.items()):
            seen_at, patience_s = replica.seen_at, GONE_AFTER_S
            if seen_at is None:  # it starts, or it died while it did
                seen_at, patience_s = replica.heard_at, START_PATIENCE_S
            if last_look - seen_at > patience_s:
                del self._replicas[replica_id]

    @property
    def heard(self) -> set[str]:
        """SLMs of which a replica has spoken."""
        return {r.slm_id for r in self._replicas.values() if r.reported}

    @property
    def settled(self) -> bool:
        """Whether no replica is on its way to another tier."""
        return all(r.tier in _SETTLED for r in self._replicas.values())

    def tier(self, spec: SLMSpec, now: float) -> Residency:
        """The SLM's tier: that of its replica that takes most memory.

        Serve starts what is missing of `min_replicas`, so a missing replica is one that starts.
        """
        tiers = {r.tier for r in self._replicas.values() if r.slm_id == spec.id}
        if self._count(spec) >= spec.scaling.min_replicas:
            self._owed_since.pop(spec.id, None)
        elif now - self._owed_since.setdefault(spec.id, now) < OWED_PATIENCE_S:
            tiers.add(Residency.STARTING)
        return next((t for t in _ORDER if t in tiers), Residency.COLD)

    def bytes_by_node(self, spec: SLMSpec) -> dict[str, int]:
        """Declared bytes of the SLM's replicas while they are hot."""
        nodes: dict[str, int] = {}
        unplaced = max(self._count(spec), spec.scaling.min_replicas, 1)
        for replica in self._replicas.values():
            if replica.slm_id == spec.id and replica.node:
                nodes[replica.node] = nodes.get(replica.node, 0) + spec.declared_bytes
                unplaced -= 1
        # Where a replica will be, nobody knows yet: it counts on every node that there is.
        known = {r.node for r in self._replicas.values() if r.node} or {""}
        for node in known if unplaced else ():
            nodes[node] = nodes.get(node, 0) + unplaced * spec.declared_bytes
        return nodes

    def _count(self, spec: SLMSpec) -> int:
        return sum(1 for r in self._replicas.values() if r.slm_id == spec.id)

    def _of(self, slm_id: str, replica_id: str, tier: Residency, now: float) -> _Replica:
        replica = self._replicas.get(replica_id)
        if replica is None:
            if len(self._replicas) >= MAX_REPLICAS:
                del self._replicas[next(iter(self._replicas))]
            replica = self._replicas[replica_id] = _Replica(slm_id, tier, now)
        return replica


def hot_bytes(occupants: Iterable[Occupant]) -> int:
    """Declared bytes in memory, on the fullest node."""
    nodes: dict[str, int] = {}
    for occupant in occupants:
        for node, size in occupant.bytes_by_node.items() if occupant.tier in OCCUPYING else ():
            nodes[node] = nodes.get(node, 0) + size
    return max(nodes.values(), default=0)
