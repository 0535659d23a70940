"""Statistics of the engine's steps: the load that routers read, and vLLM's metrics through Ray.

Pinned to vLLM 0.32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

RECORD_PERIOD_S = 0.25
# Statistics that cannot be summed over steps: a step that has one is recorded at once.
_NOT_SUMMED = (
    "connector_prefix_cache_stats",
    "spec_decoding_stats",
    "kv_connector_stats",
    "ec_connector_stats",
    "perf_stats",
)


@dataclass(slots=True)
class EngineLoad:
    """The scheduler's last reported load; updated in place by the stat logger."""

    steps: int = 0  # since its start
    running: int = 0
    waiting: int = 0
    kv_usage_ratio: float = 0.0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0

    @property
    def cached_prefix_ratio(self) -> float:
        """Share of prompt tokens served from the prefix cache since start."""
        return self.prefix_hits_tokens / max(self.prefix_queries_tokens, 1)


def load_logger(load: EngineLoad) -> type[StatLoggerBase]:
    """Return a stat logger that copies scheduler statistics into `load` after every step."""

    class LoadLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            del vllm_config, engine_index

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            iteration_stats: IterationStats | None,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            del iteration_stats, mm_cache_stats, engine_idx
            load.steps += 1
            if scheduler_stats is None:
                return
            load.running = scheduler_stats.num_running_reqs
            load.waiting = scheduler_stats.num_waiting_reqs
            load.kv_usage_ratio = scheduler_stats.kv_cache_usage
            load.prefix_queries_tokens += scheduler_stats.prefix_cache_stats.queries
            load.prefix_hits_tokens += scheduler_stats.prefix_cache_stats.hits

        def log_engine_initialized(self) -> None:
            pass

    return LoadLogger


class BatchedStatLogger(RayPrometheusStatLogger):  # type: ignore[misc]
    """vLLM's Ray metrics, recorded every RECORD_PERIOD_S and when the engine becomes idle.

    vLLM records after every step, which takes a fifth of a small model's CPU time. The steps in
    between are summed, so that counters and histograms reach the same values.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scheduler: SchedulerStats | None = None
        self._iterations: IterationStats | None = None
        self._due_s = 0.0
        # Observed per step in `record`: a sum over steps is not one step.
        self._step_tokens: Any = vars(self)["histogram_iteration_tokens"]
        self.histogram_iteration_tokens: Any = dict.fromkeys(self.engine_indexes, _NullHistogram())

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add a step to the sums; record the sums when they are due."""
        if iteration_stats is not None:
            tokens = iteration_stats.prompt_token_stats.computed
            tokens += iteration_stats.num_generation_tokens
            self._step_tokens[engine_idx].observe(tokens)
        self._iterations = _merge_iterations(self._iterations, iteration_stats)
        if scheduler_stats is not None and self._scheduler is not None:
            scheduler_stats = _merge_scheduler(self._scheduler, scheduler_stats)
        self._scheduler = scheduler_stats or self._scheduler
        now_s = time.monotonic()
        idle = self._scheduler is None or not self._scheduler.num_running_reqs
        must_record = mm_cache_stats is not None or any(
            getattr(scheduler_stats, name, None) for name in _NOT_SUMMED
        )
        if now_s < self._due_s and not idle and not must_record:
            return
        self._due_s = now_s + RECORD_PERIOD_S
        scheduler, iterations = self._scheduler, self._iterations
        self._scheduler = self._iterations = None
        super().record(scheduler, iterations, mm_cache_stats, engine_idx)


class _NullHistogram:
    def observe(self, value: float) -> None:
        """Do nothing."""


def _merge_scheduler(before: SchedulerStats, now: SchedulerStats) -> SchedulerStats:
    """Return the newest state, with the counts of both."""
    cache, older = now.prefix_cache_stats, before.prefix_cache_stats
    changes: dict[str, Any] = {
        "prefix_cache_stats": replace(
            cache, queries=cache.queries + older.queries, hits=cache.hits + older.hits
        ),
        "kv_cache_eviction_events": [
            *before.kv_cache_eviction_events,
            *now.kv_cache_eviction_events,
        ],
    }
    return replace(now, **changes)


def _merge_iterations(
    total: IterationStats | None, step: IterationStats | None
) -> IterationStats | None:
    if total is None or step is None:
        return step or total
    _add_fields(vars(total), vars(step))
    return total


def _add_fields(total: dict[str, Any], step: dict[str, Any]) -> None:
    for name, value in step.items():
        if isinstance(value, int):
            total[name] += value
        elif isinstance(value, list):
            total[name].extend(value)
        elif name == "prompt_token_stats":
            _add_fields(vars(total[name]), vars(value))
