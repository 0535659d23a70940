"""Catalogue: name, kind, labels and description of every metric of a router.

Units are base units: seconds, joules, tokens, bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Kinds of Prometheus metrics."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. A counter's exported name gets `_total` appended."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()


SPLIT = ("slm", "path", "cache", "warmth")
SLM = ("slm",)
GOAL = ("goal",)
_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

# Upper bounds in seconds, about two per octave in the usual range: small SLMs reply within
# milliseconds, cold starts take tens of seconds.
FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2, 5, 10, 20, 60)
PER_TOKEN_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.035, 0.05, 0.1, 0.25, 1)
WHOLE_S = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2, 3.5, 5, 10, 20, 60, 120)
QUEUE_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
DECISION_S = (5e-5, 1e-4, 2e-4, 3.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)

METRICS: tuple[Metric, ...] = (
    Metric("calm_requests", _C, "Finished requests.", (*SPLIT, "reason", "status")),
    Metric("calm_refused_requests", _C, "Requests that got an error.", ("slm", "kind")),
    Metric("calm_failed_attempts", _C, "SLMs that gave no answer.", ("slm", "kind")),
    Metric("calm_cost", _C, "Money for requests, failed ones too.", ("slm", "currency")),
    Metric("calm_retries", _C, "Failovers before the first byte.", SLM),
    Metric("calm_ttft_seconds", _H, "Time to first token.", SPLIT, FIRST_TOKEN_S),
    Metric("calm_tpot_seconds", _H, "Time per output token after the first.", SPLIT, PER_TOKEN_S),
    Metric("calm_e2e_seconds", _H, "End-to-end time of answered requests.", SPLIT, WHOLE_S),
    Metric("calm_queue_seconds", _H, "Wait inside the engine.", SPLIT, QUEUE_S),
    Metric("calm_decision_seconds", _H, "Time to decide.", ("slm", "path"), DECISION_S),
    Metric("calm_prompt_tokens", _C, "Prompt tokens.", SPLIT),
    Metric("calm_cached_tokens", _C, "Prompt tokens found in the prefix cache.", SPLIT),
    Metric("calm_output_tokens", _C, "Output tokens.", SPLIT),
    Metric("calm_energy_joules", _C, "Energy charged to requests.", (*SPLIT, "source")),
    Metric("calm_requests_per_second", _G, "Recent rate of finished requests.", SLM),
    Metric("calm_slm_state", _G, "1 for the residency tier the SLM is in.", ("slm", "state")),
    Metric("calm_slm_replicas", _G, "Replicas that can answer.", SLM),
    Metric("calm_slm_target_replicas", _G, "Configured minimum of replicas.", SLM),
    Metric("calm_slm_running_requests", _G, "Requests in the engines' batches.", SLM),
    Metric("calm_slm_waiting_requests", _G, "Requests waiting in the engines.", SLM),
    Metric("calm_slm_capacity_requests", _G, "Requests that may run at once.", SLM),
    Metric("calm_slm_kv_usage_ratio", _G, "KV cache in use, mean over replicas.", SLM),
    Metric("calm_slm_cached_prefix_ratio", _G, "Prompt tokens served from cache.", SLM),
    Metric("calm_slm_memory_bytes", _G, "Memory of all replicas.", SLM),
    Metric("calm_slm_start_seconds", _G, "Last start, by phase.", ("slm", "phase")),
    Metric("calm_slm_wake_seconds", _G, "Last wake-up from sleep.", SLM),
    Metric("calm_residency_hits", _C, "Requests whose preferred SLM was hot.", SLM),
    Metric("calm_residency_misses", _C, "Requests whose preferred SLM was not hot.", SLM),
    Metric("calm_residency_swaps", _G, "Wake-ups planned since the last deployment.", ()),
    Metric("calm_residency_budget_bytes", _G, "Declared bytes that may be hot per node.", ()),
    Metric("calm_residency_hot_bytes", _G, "Declared bytes in memory, fullest node.", ()),
    Metric("calm_queued_requests", _G, "Requests that wait for their SLM to wake.", ()),
    Metric("calm_slm_calibration_factor", _G, "Recent successes over predicted ones.", SLM),
    Metric("calm_energy_idle_joules", _G, "Energy charged to no request.", ("slm", "source")),
    Metric("calm_energy_attribution_error_ratio", _G, "Relative error of requests plus idle.", SLM),
    Metric("calm_alarm", _G, "1 while the alarm is on.", ("kind", "slm")),
    Metric("calm_calibration_error_ratio", _G, "Mean error of P(success).", ()),
    Metric("calm_unfamiliar_ratio", _G, "Share of prompts unlike the predictor's training.", ()),
    Metric("calm_choice_entropy_ratio", _G, "Spread of choices: 0 one SLM, 1 equal.", ()),
    Metric("calm_choice_gain", _G, "Score gained over content-blind choices.", ("against",)),
    Metric("calm_router_requests", _G, "Requests for SLMs that the router works on.", ()),
    Metric("calm_fleet_ready", _G, "1 when every SLM that must be hot is ready.", ()),
    Metric("calm_goal_target", _G, "The configured target.", GOAL),
    Metric("calm_goal_measured", _G, "The goal's metric over recent requests.", GOAL),
    Metric("calm_goal_held", _G, "1 while the goal is held within 10 %.", GOAL),
    Metric("calm_weight", _G, "Weights in use, quality points per unit.", ("kind",)),
    Metric("calm_host_cpu_ratio", _G, "Busy share of the router's host's cores.", ()),
    Metric("calm_host_memory_used_bytes", _G, "Memory in use on the router's host.", ()),
    Metric("calm_host_memory_total_bytes", _G, "Memory of the router's host.", ()),
)
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
