"""Reports of routers and SLM replicas to the knowledge actor, and its replies."""

from __future__ import annotations

from dataclasses import dataclass, field

from calm_serve.protocol.formats import RecordFormat


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """Progress of an SLM replica's start-up, sleep or wake-up."""

    state: str
    ready_s: dict[str, float] = field(default_factory=dict)  # seconds by phase so far
    detail: str = ""  # for display
    at: float = 0.0  # Unix time in seconds at which the actor received it


@dataclass(frozen=True, slots=True)
class EnergyReport:
    """One replica's energy, in joules since its start."""

    requests_j: float
    idle_j: float
    total_j: float
    check_j: float  # `total_j` measured independently, to check the attribution
    source: str  # "counter", "rapl" or "estimate"


@dataclass(frozen=True, slots=True)
class DemandReport:
    """One router's demand for SLMs since its last report."""

    arrivals: tuple[str, ...] = ()  # preferred SLM of each request, in order
    queued: dict[str, int] = field(default_factory=dict)  # requests waiting for a wake-up, by SLM
    running: dict[str, int] = field(default_factory=dict)  # requests in the SLM, by SLM
    replicas: dict[str, dict[str, str]] = field(default_factory=dict)  # SLM -> replica -> node
    hits: int = 0  # requests whose preferred SLM was hot
    misses: int = 0


@dataclass(frozen=True, slots=True)
class ResidencySummary:
    """Use of the memory budget, for display."""

    policy: str
    budget_bytes: int
    hot_bytes: int
    peak_bytes: int
    swaps: int
    hits: int
    misses: int
    hit_ratio: float | None
    recent_hit_ratio: float | None
    queued_requests: int  # queued for a wake-up


@dataclass(frozen=True, slots=True)
class DemandReply:
    """Reply to a demand report."""

    waits: dict[str, float] = field(default_factory=dict)  # SLM -> seconds until it can answer
    summary: ResidencySummary | None = None  # None without a memory budget


REPLICA_REPORT: RecordFormat[ReplicaReport] = RecordFormat("replica_report", 1, ReplicaReport)
ENERGY_REPORT: RecordFormat[EnergyReport] = RecordFormat("energy_report", 1, EnergyReport)
DEMAND_REPORT: RecordFormat[DemandReport] = RecordFormat("demand_report", 1, DemandReport)
DEMAND_REPLY: RecordFormat[DemandReply] = RecordFormat("demand_reply", 1, DemandReply)
