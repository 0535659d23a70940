"""What logged outcomes say of a predictor: labels, predictions made again, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from calm_serve.knowledge import scores
from calm_serve.knowledge.labels import quality_label
from calm_serve.prediction import (
    LOAD_NAMES,
    MAX_LOG_RESIDUAL,
    OUTPUT_TOKENS,
    SUCCESS,
    Artifact,
    Heads,
    Values,
    outcome_rows,
)
from calm_serve.types import Outcome

ANALYTIC_TTFT = LOAD_NAMES.index("log_analytic_ttft")


def label_arrays(outcomes: Sequence[Outcome]) -> tuple[Values, Values]:
    """Labels and weights of labelled outcomes. Raises ValueError for an unlabelled one."""
    pairs = [quality_label(o.signals) for o in outcomes]
    if any(p is None for p in pairs):
        raise ValueError("an outcome has no quality label")
    both = np.array([p for p in pairs if p is not None], dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def success_probabilities(
    artifact: Artifact, outcomes: Sequence[Outcome], fallback: float
) -> Values:
    """P(success) of logged outcomes; `fallback` where the artifact does not know the SLM."""
    rows = outcome_rows(outcomes, artifact.slm_ids)
    found = Heads(artifact).of_own(SUCCESS, rows)
    return np.where(np.isnan(found), fallback, found)


def answered(outcome: Outcome) -> bool:
    """Whether it says how long answers are."""
    return outcome.status == "ok" and outcome.output_tokens > 0


def timed(outcome: Outcome) -> bool:
    """Whether its first token is an awake SLM's own: starting one, and another that failed
    before it, are not the residual's business.
    """
    own = not outcome.cold and not outcome.retries
    return answered(outcome) and own and (outcome.ttft_s or 0.0) > 0.0


def success_metrics(
    artifact: Artifact, holdout: Sequence[Outcome], base_rate: float
) -> dict[str, Any]:
    """Log losses in nats, AUC and calibration error on labelled outcomes."""
    labels, weights = label_arrays(holdout)
    predicted = success_probabilities(artifact, holdout, base_rate)
    served = np.array([o.predicted[0] if o.predicted else base_rate for o in holdout])
    return {
        "holdout_labelled": len(holdout),
        "log_loss": scores.log_loss(labels, predicted, weights),
        "base_rate_log_loss": scores.log_loss(labels, np.full(len(labels), base_rate), weights),
        "served_log_loss": scores.log_loss(labels, served, weights),
        "auc": scores.auc(labels, predicted, weights),
        "calibration_error": scores.calibration_error(labels, predicted, weights),
    }


def regression_metrics(
    artifact: Artifact, holdout: Sequence[Outcome], fit: Sequence[Outcome]
) -> dict[str, Any]:
    """Mean absolute errors on the holdout, next to the analytic model and the mean length."""
    heads, metrics = Heads(artifact), dict[str, Any]()
    first_tokens = [o for o in holdout if timed(o)]
    residual = (
        heads.residuals(outcome_rows(first_tokens, artifact.slm_ids)) if first_tokens else None
    )
    if residual is not None:
        seen = np.array([o.ttft_s or 0.0 for o in first_tokens])
        analytic = np.exp([o.load[ANALYTIC_TTFT] for o in first_tokens])
        corrected = analytic * np.exp(np.clip(residual, -MAX_LOG_RESIDUAL, MAX_LOG_RESIDUAL))
        metrics["ttft_mae_s"] = float(np.mean(np.abs(seen - corrected)))
        metrics["analytic_ttft_mae_s"] = float(np.mean(np.abs(seen - analytic)))
    whole = [o for o in holdout if answered(o)]
    logs = heads.of_own(OUTPUT_TOKENS, outcome_rows(whole, artifact.slm_ids))
    known = ~np.isnan(logs)
    if known.any():
        lengths = np.array([o.output_tokens for o in whole], dtype=np.float64)[known]
        mean = np.mean([o.output_tokens for o in fit if answered(o)])
        metrics["output_tokens_mae"] = float(np.mean(np.abs(lengths - np.expm1(logs[known]))))
        metrics["mean_output_tokens_mae"] = float(np.mean(np.abs(lengths - mean)))
    return metrics
