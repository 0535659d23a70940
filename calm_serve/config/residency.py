"""Which SLMs may stay in memory, and what may be done to those that may not."""

from __future__ import annotations

from enum import StrEnum

from pydantic import ByteSize, Field

from calm_serve.config.base import Config


class ResidencyPolicyName(StrEnum):
    """Who chooses the SLMs that are hot. All but `calm` are baselines to compare with."""

    CALM = "calm"  # forecast value per byte, with prefetch and guards against thrash
    LRU = "lru"  # the CALM paper's: the least recently wanted goes first
    LFU = "lfu"  # the least often wanted goes first
    STATIC = "static"  # pinned SLMs, then the fleet file's order; nothing ever moves


class ResidencyOptions(Config):
    """Memory that SLMs share, and how they take turns. Without a budget every SLM stays hot.

    An SLM counts with its declared bytes (see `SLMSpec.declared_bytes`) for each hot replica, on
    the node where the replica runs. `residency: pinned` keeps an SLM hot whatever happens; `hot`
    starts hot as far as the budget goes; both, and `on_demand` SLMs that have replicas, sleep and
    wake in place.
    """

    memory_budget_bytes: ByteSize | None = Field(
        default=None, gt=0, description="Declared bytes of hot replicas per node; null is no limit."
    )
    policy: ResidencyPolicyName = Field(
        default=ResidencyPolicyName.CALM, description="See ResidencyPolicyName."
    )
    min_resident_s: float = Field(
        default=0.25, ge=0, le=3600, description="An SLM that woke stays hot at least this long."
    )
    max_swaps_per_min: int = Field(
        default=240, ge=1, le=10_000, description="Wake-ups per minute, all SLMs together."
    )
    hold_s: float = Field(
        default=30.0, ge=0, le=600, description="Longest that a request waits for its SLM to wake."
    )
    cold_after_s: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="on_demand SLMs with min_replicas 0 lose their replicas after this long "
        "without being wanted, by deployments.slm.autoscaling:ColdTierPolicy; null: never.",
    )
