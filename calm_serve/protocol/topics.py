"""Topics of the knowledge actor, with one typed, versioned record each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import Base64Bytes

from calm_serve.config import ResidencyOptions
from calm_serve.errors import KnowledgeError
from calm_serve.protocol.formats import RecordFormat
from calm_serve.protocol.reports import ReplicaReport
from calm_serve.types import Residency


class Topic(StrEnum):
    """Name of a topic, and the content of its record."""

    PREDICTOR = "predictor"  # the champion, once there is one
    CHALLENGER = "challenger"  # decides in the shadow; None without one
    COLD_START = "cold_start"  # boosters of cold-start SLMs; None without any
    PREDICTORS = "predictors"  # status of the others, and the last change
    REPLICAS = "replicas"  # SLM -> replica -> its last report
    SLMS = "slms"  # SLMs of other applications
    GOALS = "goals"  # the change in force
    RESIDENCY = "residency"  # desired tiers, once there has been a memory budget
    MONITOR = "monitor"  # drift, calibration factors, alarms
    ENERGY = "energy"  # SLM -> joules


@dataclass(frozen=True, slots=True)
class PublishedPredictor:
    """A predictor that routers load; `source` is "trained", "shipped" or "cold_start"."""

    version: str  # of the artifact
    source: str
    blob: Base64Bytes  # `prediction.Artifact.to_bytes`


@dataclass(frozen=True, slots=True)
class PredictorChange:
    """The last change of the champion: promotion, pin or roll-back."""

    at: float  # Unix time in seconds
    action: str
    version: str
    before: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """Live comparison of a challenger's choices with the champion's."""

    version: str
    requests: int
    agreement_ratio: float | None = None  # None before the first request
    predicted_gain: float | None = None  # of score per request, by the challenger's predictions
    predicted_gain_ci95: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class LiveComparison:
    """Champion against its predecessor on live labels: log losses in nats, calibration errors.

    A positive gain favours the champion.
    """

    labelled: int
    log_loss: float
    previous_log_loss: float
    gain: float
    gain_ci95: tuple[float, float]
    calibration_error: float
    previous_calibration_error: float
    surely_worse: bool

    def reason(self, previous: str) -> str:
        """The comparison with `previous`, a version, in one line."""
        low, high = self.gain_ci95
        return (
            f"log loss {self.log_loss:.3f} against {self.previous_log_loss:.3f} that {previous} "
            f"would have had on {self.labelled} labelled outcomes (gain {self.gain:+.3f}, CI95 "
            f"{low:+.3f} to {high:+.3f}), calibration error {self.calibration_error:.3f} against "
            f"{self.previous_calibration_error:.3f}"
        )


@dataclass(frozen=True, slots=True)
class PredictorStatus:
    """Status of the predictors besides the champion; versions are "" for none."""

    previous: str = ""
    challenger: str = ""
    pinned: str = ""
    shadow: ShadowReport | None = None
    post_promotion: LiveComparison | None = None
    last_change: PredictorChange | None = None


@dataclass(frozen=True, slots=True)
class RegisteredSLM:
    """An SLM of another application: its entry as in a fleet file, and the application's name."""

    spec: dict[str, Any]
    app_name: str


@dataclass(frozen=True, slots=True)
class GoalChange:
    """One entry of the audit trail. Goals are plain data without fields that have their default."""

    at: float  # Unix time in seconds
    by: str  # label of the caller
    old: dict[str, Any] | None  # None for the first goals
    new: dict[str, Any]
    revision: int = 0  # grows with every change


@dataclass(frozen=True, slots=True)
class DesiredResidency:
    """The desired tier of each SLM; an SLM that is missing is to be hot."""

    tiers: dict[str, Residency] = field(default_factory=dict)  # empty without a memory budget
    options: ResidencyOptions = field(default_factory=ResidencyOptions)


@dataclass(frozen=True, slots=True)
class Alarm:
    """A detected change that is still on."""

    # "quality", "tokens", "speed", "prompt_mix", "calibration", "unfamiliar", "constant_selector"
    kind: str
    slm: str  # "" when it concerns the whole fleet
    size: float  # by kind: a factor, an index or a mean error
    since: float  # on the clock of the `Alarms`
    detail: str = ""
    replica: str = ""


@dataclass(frozen=True, slots=True)
class UnfamiliarAnswers:
    """Answers of one SLM to unfamiliar prompts: how many labels there are, and their mean."""

    answers: float
    quality: float


@dataclass(frozen=True, slots=True)
class MonitorFindings:
    """Findings of the outcome monitor from the outcomes of all routers."""

    # SLM -> factor on P(success); 1 where it is missing
    calibration_factors: dict[str, float] = field(default_factory=dict)
    calibration_error: float | None = None  # mean error of P(success)
    alarms: tuple[Alarm, ...] = ()
    unfamiliar_ratio: float | None = None  # share of the last prompts; None: too few
    unfamiliar_answers: dict[str, UnfamiliarAnswers] = field(default_factory=dict)  # by SLM


@dataclass(frozen=True, slots=True)
class SLMEnergy:
    """Joules of all replicas of one SLM, dead ones included, since the actor started."""

    requests_j: float
    idle_j: float
    total_j: float
    source: str  # "mixed" where replicas have different ones
    estimated: bool
    attribution_error_ratio: float | None  # |requests + idle - check| / check
    at: float  # Unix time in seconds of the last report, on the actor's clock


FORMATS: Mapping[Topic, RecordFormat[Any]] = {
    Topic.PREDICTOR: RecordFormat("predictor", 1, PublishedPredictor),
    Topic.CHALLENGER: RecordFormat("challenger", 1, PublishedPredictor | None),
    Topic.COLD_START: RecordFormat("cold_start", 1, PublishedPredictor | None),
    Topic.PREDICTORS: RecordFormat("predictors", 1, PredictorStatus),
    Topic.REPLICAS: RecordFormat("replicas", 1, dict[str, dict[str, ReplicaReport]]),
    Topic.SLMS: RecordFormat("slms", 1, dict[str, RegisteredSLM]),
    Topic.GOALS: RecordFormat("goals", 1, GoalChange),
    Topic.RESIDENCY: RecordFormat("residency", 1, DesiredResidency),
    Topic.MONITOR: RecordFormat("monitor", 1, MonitorFindings),
    Topic.ENERGY: RecordFormat("energy", 1, dict[str, SLMEnergy]),
}

# Calls of the knowledge actor whose records topics have too.
REGISTRATION: RecordFormat[RegisteredSLM] = RecordFormat("registration", 1, RegisteredSLM)
GOAL_CHANGES: RecordFormat[tuple[GoalChange, ...]] = RecordFormat(
    "goal_changes", 1, tuple[GoalChange, ...]
)


@dataclass(frozen=True, slots=True)
class Update:
    """A topic's record as it is sent to a follower."""

    revision: int  # differs from every earlier one; unrelated to the format's version
    payload: bytes  # in the topic's format


def decode(topic: str, update: Update) -> Any:
    """The topic's record. Raises KnowledgeError for an unknown topic and a newer version."""
    try:
        found = FORMATS[Topic(topic)]
    except ValueError:
        raise KnowledgeError(
            f"unknown topic {topic!r}: the knowledge actor runs a newer program"
        ) from None
    return found.decode(update.payload)
