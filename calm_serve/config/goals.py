"""Operator goals and the selection policy. Both may be changed at run time."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from calm_serve.config.base import Config, Identifier, Ratio


class SelectionPolicyName(StrEnum):
    """How the SLM is chosen. All but `calm` are baselines for comparison."""

    CALM = "calm"  # rules, then the best score of the predictions under the goals
    PAPER = "paper"  # the CALM paper's score: similarity and recent QoS, fixed weights
    RANDOM = "random"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    LARGEST = "largest"  # most parameters
    SINGLE = "single"  # one SLM for everything: the best one, or the generalist
    SHARES = "shares"  # random with given shares: content-blind, matched to another policy
    RULES = "rules"  # rules alone; without a match the SLM with most skills
    FASTEST = "fastest"  # the lowest predicted end-to-end latency


class SelectionPolicy(Config):
    """The selection policy and its parameters."""

    name: SelectionPolicyName = Field(
        default=SelectionPolicyName.CALM, description="See SelectionPolicyName."
    )
    slm: str = Field(default="", description="Id of the SLM of `single`.")
    shares: dict[Identifier, Ratio] = Field(
        default={}, description="SLM id to share of `shares`; they are scaled to 1."
    )

    @model_validator(mode="after")
    def _complete(self) -> SelectionPolicy:
        if bool(self.slm) != (self.name is SelectionPolicyName.SINGLE):
            raise ValueError("`slm` is required when the policy is single, and only then")
        if bool(self.shares) != (self.name is SelectionPolicyName.SHARES):
            raise ValueError("`shares` are required when the policy is shares, and only then")
        if self.shares and sum(self.shares.values()) <= 0.0:
            raise ValueError("at least one of `shares` must be above 0")
        return self


class Goals(Config):
    """Targets to meet, and the weights of the score.

    Without a target the weights stay as they are. With one they are where the controller starts,
    and it moves them until the target is met. Weights are quality points (0 to 1) per unit.
    """

    ttft_p95_s: float | None = Field(
        default=None, gt=0, le=600, description="Target: 95 of 100 first tokens within this."
    )
    e2e_p95_s: float | None = Field(
        default=None, gt=0, le=3600, description="Target: 95 of 100 answers complete within this."
    )
    energy_per_request_j: float | None = Field(
        default=None, gt=0, le=1e6, description="Target: at most this many joules, on the mean."
    )
    power_w: float | None = Field(
        default=None, gt=0, le=1e6, description="Budget: joules that requests spend per second."
    )
    min_quality: Ratio | None = Field(
        default=None, description="Target: predicted quality, on the mean, at least this."
    )
    latency_weight_per_s: float = Field(
        default=0.1, ge=0, le=100, description="Quality given up to save one second."
    )
    energy_weight_per_j: float = Field(
        default=0.002, ge=0, le=100, description="Quality given up to save one joule."
    )
    switching_weight: float = Field(
        default=0.05,
        ge=0,
        le=100,
        description="Cost of an SLM that is not hot, besides its wake-up time.",
    )
    quality_floor: Ratio = Field(default=0.0, description="Exclude SLMs predicted below this.")
    exploration_ratio: float = Field(
        default=0.01, ge=0, le=0.5, description="Share of scored requests that explore."
    )
    default_slm: str = Field(
        default="",
        description="Id of the SLM for prompts unlike all that the predictor was trained on, where "
        "no SLM's `generality` is above 0.5; '': the score decides.",
    )
    policy: SelectionPolicy = Field(default=SelectionPolicy(), description="See SelectionPolicy.")

    @property
    def targets(self) -> dict[str, float]:
        """The targets that are set, by field name."""
        names = ("ttft_p95_s", "e2e_p95_s", "energy_per_request_j", "power_w", "min_quality")
        return {n: v for n in names if (v := getattr(self, n)) is not None}
