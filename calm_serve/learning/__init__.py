"""Learning: labels to promotion. Owner: knowledge actor, router. The actor's part may block.

Takes outcomes from a log (`LabelledLog`, `TrainingLog`) and gives predictors, verdicts, calibration
factors and alarms. The router imports `decision_terms` and `Shadow`, which never block. In the
actor, files are touched through the model registry only; training runs in a child process.
"""

from calm_serve.learning.cold_start import ColdStartSLMs, ColdStartTrainer, fit_cold_start
from calm_serve.learning.decision_log import decision_terms
from calm_serve.learning.labels import quality_label
from calm_serve.learning.metrics import auc, calibration_error, ci95, log_loss, resampled
from calm_serve.learning.monitor import OutcomeMonitor
from calm_serve.learning.promotion import Promotion
from calm_serve.learning.replay import Replay, ReplaySettings
from calm_serve.learning.retraining import (
    RETRAIN_JOB,
    RETRAIN_REPLY,
    RetrainingScheduler,
    RetrainJob,
    RetrainReply,
    RetrainResult,
    retrain,
)
from calm_serve.learning.shadow import Shadow
from calm_serve.learning.training import TRAINED_UNTIL, refitted, train

__all__ = [
    "RETRAIN_JOB",
    "RETRAIN_REPLY",
    "TRAINED_UNTIL",
    "ColdStartSLMs",
    "ColdStartTrainer",
    "OutcomeMonitor",
    "Promotion",
    "Replay",
    "ReplaySettings",
    "RetrainJob",
    "RetrainReply",
    "RetrainResult",
    "RetrainingScheduler",
    "Shadow",
    "auc",
    "calibration_error",
    "ci95",
    "decision_terms",
    "fit_cold_start",
    "log_loss",
    "quality_label",
    "refitted",
    "resampled",
    "retrain",
    "train",
]
