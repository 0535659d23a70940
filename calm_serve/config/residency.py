"""The memory budget that SLMs share, and the policy that keeps it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import ByteSize, Field

from calm_serve.config.base import Config


class ResidencyPolicyName(StrEnum):
    """How hot SLMs are chosen. All but `calm` are baselines for comparison."""

    CALM = "calm"  # forecast value per byte, with prefetch and guards against thrashing
    LRU = "lru"  # the CALM paper's: the least recently requested goes to sleep first
    LFU = "lfu"  # the least often requested goes to sleep first
    STATIC = "static"  # pinned SLMs, then the fleet file's order; nothing changes at run time


class ResidencyOptions(Config):
    """The memory budget of all SLMs, and its policy. Without a budget every SLM stays hot.

    An SLM counts with its declared bytes (see `SLMSpec.declared_bytes`) for each hot replica, on
    the node where the replica runs. `residency: pinned` always keeps an SLM hot; `hot` starts hot
    as far as the budget allows. `hot` SLMs, and `on_demand` SLMs that have replicas, sleep and
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
        "without a request for them, by deployments.slm.autoscaling:ColdTierPolicy; null: never.",
    )
