"""What the engine says of its steps: the load that routers read, and vLLM's metrics in Ray's.

One of the modules that touch vLLM, see `engine.py`. Pinned to vLLM 0.32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

RECORD_S = 0.25
# vLLM has no sum for these: a step that has one is recorded at once.
_NOT_ADDED = (
    "connector_prefix_cache_stats",
    "spec_decoding_stats",
    "kv_connector_stats",
    "ec_connector_stats",
    "perf_stats",
)


@dataclass(slots=True)
class EngineLoad:
    """The scheduler's last word on its load; replaced in place by the stat logger."""

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
    """A stat logger that copies scheduler statistics into `load` after every step."""

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
    """vLLM's Ray metrics, recorded four times a second and when the engine falls idle.

    vLLM records after every step, which for a small model costs a fifth of its replica's time. The
    steps in between are added up, so that counters and histograms end at the same values.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scheduler: SchedulerStats | None = None
        self._iterations: IterationStats | None = None
        self._due_s = 0.0
        # A sum over steps must not be counted as one step.
        self._step_tokens: Any = vars(self)["histogram_iteration_tokens"]
        self.histogram_iteration_tokens: Any = dict.fromkeys(self.engine_indexes, _Nowhere())

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add a step up, or record what was added up."""
        if iteration_stats is not None:
            tokens = iteration_stats.prompt_token_stats.computed
            tokens += iteration_stats.num_generation_tokens
            self._step_tokens[engine_idx].observe(tokens)
        self._iterations = _added(self._iterations, iteration_stats)
        if scheduler_stats is not None and self._scheduler is not None:
            scheduler_stats = _after(self._scheduler, scheduler_stats)
        self._scheduler = scheduler_stats or self._scheduler
        now_s = time.monotonic()
        idle = self._scheduler is None or not self._scheduler.num_running_reqs
        whole = mm_cache_stats is not None or any(
            getattr(scheduler_stats, name, None) for name in _NOT_ADDED
        )
        if now_s < self._due_s and not idle and not whole:
            return
        self._due_s = now_s + RECORD_S
        scheduler, iterations = self._scheduler, self._iterations
        self._scheduler = self._iterations = None
        super().record(scheduler, iterations, mm_cache_stats, engine_idx)


class _Nowhere:
    def observe(self, value: float) -> None:
        """Forget it."""


def _after(before: SchedulerStats, now: SchedulerStats) -> SchedulerStats:
    """The newest state, with the counts of both."""
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


def _added(total: IterationStats | None, step: IterationStats | None) -> IterationStats | None:
    if total is None or step is None:
        return step or total
    _add(vars(total), vars(step))
    return total


def _add(total: dict[str, Any], step: dict[str, Any]) -> None:
    for name, value in step.items():
        if isinstance(value, int):
            total[name] += value
        elif isinstance(value, list):
            total[name].extend(value)
        elif name == "prompt_token_stats":
            _add(vars(total[name]), vars(value))
