"""Telemetry: bounded statistics of measurements. Owner: router, SLM replica. Never blocks.

Takes outcomes and replica states. Touches nothing but the energy counters, whose meters make system
calls. The knowledge actor uses some of the statistics too.
"""

from calm_serve.telemetry.alarms import Alarms
from calm_serve.telemetry.change_detection import PSI_ALARM, PSI_CLEAR, Cusum, PopulationShift
from calm_serve.telemetry.circuit_breaker import BreakerState
from calm_serve.telemetry.content_gain import ContentGainMonitor
from calm_serve.telemetry.drain_rate import DrainRate
from calm_serve.telemetry.energy import (
    DEFAULT_WATTS_PER_CORE,
    POWERCAP,
    EnergyMeter,
    TokenShareAttributor,
    best_meter,
)
from calm_serve.telemetry.nvml import NvmlMeter, visible_gpus
from calm_serve.telemetry.replica_stats import ReplicaStats
from calm_serve.telemetry.residuals import (
    CHANGE_LIMIT,
    ResidualEstimator,
    TotalRatio,
    load_at_decision,
)
from calm_serve.telemetry.slm_stats import FleetStats
from calm_serve.telemetry.statistics import DecayedPlane, DecayedRate, Ewma, decay

__all__ = [
    "CHANGE_LIMIT",
    "DEFAULT_WATTS_PER_CORE",
    "POWERCAP",
    "PSI_ALARM",
    "PSI_CLEAR",
    "Alarms",
    "BreakerState",
    "ContentGainMonitor",
    "Cusum",
    "DecayedPlane",
    "DecayedRate",
    "DrainRate",
    "EnergyMeter",
    "Ewma",
    "FleetStats",
    "NvmlMeter",
    "PopulationShift",
    "ReplicaStats",
    "ResidualEstimator",
    "TokenShareAttributor",
    "TotalRatio",
    "best_meter",
    "decay",
    "load_at_decision",
    "visible_gpus",
]
