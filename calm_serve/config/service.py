"""The `args` of the application: fleet, goals, residency, and options of router and learning."""

from __future__ import annotations

from pydantic import ByteSize, Field

from calm_serve.config.base import Config, Ratio
from calm_serve.config.fleet import Fleet
from calm_serve.config.goals import Goals
from calm_serve.config.residency import ResidencyOptions

DECISION_LOG = (
    2048  # decisions, each of a few kilobytes; explains the last minutes of a busy router
)


class Learning(Config):
    """The knowledge actor: where outcomes live and when it retrains."""

    store_url: str = Field(default="", description="SQLAlchemy URL; '' is SQLite in `state_dir`.")
    state_dir: str = Field(default=".calm", description="Predictors, spool and SQLite database.")
    keep_prompts: bool = Field(default=False, description="Store prompt text with outcomes.")
    min_outcomes: int = Field(default=200, ge=20, le=10**9, description="Before first training.")
    retrain_every: int = Field(default=200, ge=10, le=10**9, description="New labelled outcomes.")
    max_rows: int = Field(default=1_000_000, ge=1000, description="Retention; oldest go first.")
    holdout_ratio: float = Field(default=0.25, gt=0, lt=0.9, description="Newest share, by time.")
    shadow_requests: int = Field(
        default=50,
        ge=0,
        le=10**6,
        description="Scored requests that a better predictor decides in shadow before it is "
        "promoted, for 60 s at most; 0 promotes at once.",
    )


class RouterOptions(Config):
    """The router deployment."""

    replicas: int = Field(default=1, ge=1, le=256, description="One per node is usual.")
    num_cpus: float = Field(default=0.2, ge=0, le=64, description="Ray CPUs per router replica.")
    max_ongoing_requests: int = Field(
        default=512,
        ge=1,
        le=100_000,
        description="Requests for SLMs in work, per router replica; 429 beyond it. /health, "
        "/metrics and administration do not count.",
    )
    max_wakeup_ratio: Ratio = Field(
        default=0.25,
        description="Share of max_ongoing_requests that may wait for SLMs to wake or start; 503 "
        "beyond it.",
    )
    # Half of the common client timeout of a minute, so that the answer has the other half.
    max_queue_wait_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Predicted wait for a slot of an SLM; the next SLM, or 429, beyond it. A "
        "request's own deadline and x-slo-ttft-ms may be less.",
    )
    max_body_bytes: ByteSize = Field(default=ByteSize(4 << 20), description="413 above this.")
    request_timeout_s: float = Field(default=120.0, gt=0, le=3600, description="Per request.")
    retries: int = Field(default=2, ge=0, le=5, description="Failovers before the first byte.")
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Web pages of these origins may call; `*`: of any. Empty: none."
    )
    decision_log: int = Field(
        default=DECISION_LOG, ge=1, description="Decisions kept for explanation."
    )

    @property
    def total_cpus(self) -> float:
        """Ray CPUs of all router replicas together."""
        return self.num_cpus * self.replicas


class ServeArgs(Config):
    """`args` of the application in serve_config.yaml."""

    fleet: str | Fleet = Field(description="Path of a fleet file, or the fleet inline.")
    goals: Goals = Field(default=Goals(), description="See Goals.")
    learning: Learning = Field(default=Learning(), description="See Learning.")
    router: RouterOptions = Field(default=RouterOptions(), description="See RouterOptions.")
    residency: ResidencyOptions = Field(
        default=ResidencyOptions(), description="See ResidencyOptions."
    )
