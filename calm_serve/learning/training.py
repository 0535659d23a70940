"""Training: outcomes in time order become a predictor, measured on the newest, held-out share."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from calm_serve.errors import KnowledgeError
from calm_serve.learning import metrics
from calm_serve.learning.labels import quality_label
from calm_serve.prediction import (
    FIRST_BUCKET,
    FIRST_LOAD,
    LOAD_NAMES,
    MAX_LOG_RESIDUAL,
    OUTPUT_TOKENS,
    SLM_COLUMN,
    SUCCESS,
    TTFT_RESIDUAL,
    Artifact,
    Heads,
    Rows,
    Values,
    fits_layout,
    outcome_rows,
    own_head,
)
from calm_serve.types import Outcome

ANALYTIC_TTFT = LOAD_NAMES.index("log_analytic_ttft")

MIN_LABELLED = 20  # labelled outcomes; with fewer nothing is trained
MIN_LABELLED_PER_SLM = 5  # an SLM with fewer keeps its prior
# Boosting rounds at the learning rate of _PARAMS; a higher rate takes proportionally fewer.
MAX_ROUNDS = 150
DEFAULT_ROUNDS = 40  # with too few rows to choose the number
TUNING_PART = 5  # the newest 1 / TUNING_PART of the rows choose the number of rounds
MIN_TUNING_ROWS = 20
PATIENCE_ROUNDS = 15  # boosting stops after this many rounds without improvement on the tuning rows

# Small trees, because a prediction over all candidates must take tens of microseconds:
# `load_tests decision` notices larger ones. SLMs are split one against the rest, because LightGBM's
# default needs 100 rows per category.
_PARAMS: Mapping[str, Any] = {
    "learning_rate": 0.08,
    "num_leaves": 15,
    "min_data_in_leaf": 8,
    "feature_fraction": 0.8,
    "lambda_l2": 1.0,
    "max_cat_to_onehot": 64,
    "max_bin": 63,
    "num_threads": 1,
    "deterministic": True,
    "force_col_wise": True,
    "verbosity": -1,
}
# For a booster of one SLM: it has fewer rows, and needs no leaves to tell SLMs apart.
_OWN_PARAMS: Mapping[str, Any] = {"num_leaves": 7, "min_data_in_leaf": 5}
# Lengths and times have a wide spread: a third of the trees predicts them as well.
_COARSE: Mapping[str, Any] = {"learning_rate": 0.24}


@dataclass(frozen=True, slots=True)
class Training:
    """A trained predictor and the held-out labelled outcomes."""

    artifact: Artifact
    holdout: tuple[Outcome, ...]
    base_rate: float  # mean label of the training share

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The artifact's holdout metrics."""
        return self.artifact.metrics


@dataclass(frozen=True, slots=True)
class _Split:
    fit: tuple[Outcome, ...]
    holdout: tuple[Outcome, ...]
    labelled_holdout: tuple[Outcome, ...]
    labelled_fit: int


def train(
    outcomes: Sequence[Outcome],
    slm_ids: Sequence[str],
    *,
    seed: int,
    holdout_ratio: float,
    clock: Callable[[], float],
) -> Training:
    """Train on the older outcomes and measure on the newest `holdout_ratio` of labelled ones.

    Unlabelled outcomes are used for answer length and TTFT. Outcomes of SLMs outside `slm_ids`, of
    another feature layout, and of requests that were turned away are ignored. Equal input, seed and
    clock give equal bytes. Raises KnowledgeError when there are fewer than MIN_LABELLED labelled
    outcomes, or no SLM has enough.
    """
    split = _split(outcomes, set(slm_ids), holdout_ratio)
    known = _known_slms(split.fit)
    if not known:
        raise KnowledgeError(f"no SLM has {MIN_LABELLED_PER_SLM} labelled outcomes to train on")
    fit = [o for o in split.fit if o.slm_id in known]
    labels, weights = label_arrays([o for o in fit if quality_label(o.signals)])
    base_rate = float(np.average(labels, weights=weights))
    boosters = fit_heads(fit, known, seed)
    artifact = Artifact(
        version=_version(boosters, known),
        slm_ids=known,
        boosters=boosters,
        metrics={},
        trained_on=split.labelled_fit,
        created_at=clock(),
    )
    metrics = {
        "fit_outcomes": len(fit),
        "fit_until": split.holdout[0].at,
        "base_rate": base_rate,
        **success_metrics(artifact, split.labelled_holdout, base_rate),
        **regression_metrics(artifact, [o for o in split.holdout if o.slm_id in known], fit),
    }
    artifact = Artifact(
        artifact.version, known, boosters, metrics, artifact.trained_on, artifact.created_at
    )
    return Training(artifact, split.labelled_holdout, base_rate)


def _split(outcomes: Sequence[Outcome], slm_ids: set[str], holdout_ratio: float) -> _Split:
    usable = sorted(
        (o for o in outcomes if o.slm_id in slm_ids and o.status != "rejected" and fits_layout(o)),
        key=lambda o: (o.at, o.outcome_id),
    )
    labelled = [i for i, o in enumerate(usable) if quality_label(o.signals)]
    if len(labelled) < MIN_LABELLED:
        raise KnowledgeError(
            f"{len(labelled)} labelled outcomes, training needs at least {MIN_LABELLED}"
        )
    held_out = min(max(round(len(labelled) * holdout_ratio), 1), len(labelled) - 1)
    cut = labelled[-held_out]
    return _Split(
        fit=tuple(usable[:cut]),
        holdout=tuple(usable[cut:]),
        labelled_holdout=tuple(usable[i] for i in labelled[-held_out:]),
        labelled_fit=len(labelled) - held_out,
    )


def _known_slms(fit: Sequence[Outcome]) -> tuple[str, ...]:
    counts = Counter(o.slm_id for o in fit if quality_label(o.signals))
    return tuple(sorted(slm for slm, n in counts.items() if n >= MIN_LABELLED_PER_SLM))


def fit_heads(fit: Sequence[Outcome], slm_ids: Sequence[str], seed: int) -> dict[str, str]:
    """The boosters of `slm_ids` by head; heads without data are absent."""
    boosters: dict[str, str] = {}
    labelled = [o for o in fit if quality_label(o.signals)]
    labels, weights = label_arrays(labelled)
    # From equal labels nothing can be learned, so the prior is used.
    if len(set(labels.tolist())) > 1:
        for slm_id, rows, mine in _by_slm(labelled, slm_ids):
            # Rule of succession (smoothed labels): a few equal labels must not give a P(success) of
            # 0 or 1.
            smoothed = (labels[mine] * mine.sum() + 0.5) / (mine.sum() + 1.0)
            boosters[own_head(SUCCESS, slm_id)] = _fit(
                "cross_entropy", rows, smoothed, weights[mine], seed, _OWN_PARAMS
            )
    if whole := [o for o in fit if answered(o)]:
        lengths = np.log1p(np.array([o.engine.output_tokens for o in whole], dtype=np.float64))
        for slm_id, rows, mine in _by_slm(whole, slm_ids):
            boosters[own_head(OUTPUT_TOKENS, slm_id)] = _fit(
                "regression", rows, lengths[mine], None, seed, {**_OWN_PARAMS, **_COARSE}
            )
    if first_tokens := [o for o in fit if timed(o)]:
        rows = outcome_rows(first_tokens, slm_ids)
        rows[:, FIRST_BUCKET:FIRST_LOAD] = 0.0  # words have no effect on prefill time
        boosters[TTFT_RESIDUAL] = _fit(
            "regression", rows, _log_residuals(first_tokens), None, seed, _COARSE
        )
    return boosters


def _by_slm(
    outcomes: Sequence[Outcome], slm_ids: Sequence[str]
) -> Iterator[tuple[str, Rows, NDArray[np.bool_]]]:
    """Each SLM with its outcomes' rows, and which outcomes they are."""
    rows = outcome_rows(outcomes, slm_ids)
    columns = rows[:, SLM_COLUMN].copy()
    # Success and length of an answer do not depend on the load, so one call predicts them for all
    # SLMs from the prompt alone. A constant column is never split.
    rows[:, FIRST_LOAD:] = 0.0
    for index, slm_id in enumerate(slm_ids):
        mine = columns == index
        if mine.any():
            yield slm_id, rows[mine], mine


def _log_residuals(first_tokens: Sequence[Outcome]) -> Values:
    logs = [
        math.log(o.timing.ttft_s or 1.0) - o.decision.load_features[ANALYTIC_TTFT]
        for o in first_tokens
    ]
    return np.clip(np.array(logs), -MAX_LOG_RESIDUAL, MAX_LOG_RESIDUAL)


def _fit(
    objective: str,
    rows: Rows,
    target: Values,
    weights: Values | None,
    seed: int,
    own: Mapping[str, Any] | None = None,
) -> str:
    """Train one booster: the newest rows choose the number of rounds, then all rows are used."""
    params = {**_PARAMS, **(own or {}), "objective": objective, "seed": seed}
    rate_ratio = _PARAMS["learning_rate"] / params["learning_rate"]
    rounds = round(DEFAULT_ROUNDS * rate_ratio)
    cut = len(rows) - len(rows) // TUNING_PART
    if len(rows) - cut >= MIN_TUNING_ROWS:
        older = _dataset(rows[:cut], target[:cut], None if weights is None else weights[:cut])
        newer = _dataset(
            rows[cut:], target[cut:], None if weights is None else weights[cut:], older
        )
        tuned = lgb.train(
            params,
            older,
            num_boost_round=round(MAX_ROUNDS * rate_ratio),
            valid_sets=[newer],
            callbacks=[lgb.early_stopping(PATIENCE_ROUNDS, verbose=False)],
        )
        rounds = max(tuned.best_iteration, 1)
    return str(
        lgb.train(params, _dataset(rows, target, weights), num_boost_round=rounds).model_to_string()
    )


def _dataset(
    rows: Rows, target: Values, weights: Values | None, reference: lgb.Dataset | None = None
) -> lgb.Dataset:
    return lgb.Dataset(
        rows,
        label=target,
        weight=weights,
        reference=reference,
        categorical_feature=[SLM_COLUMN],
        params={"verbosity": -1, "max_bin": _PARAMS["max_bin"]},
    )


def _version(boosters: Mapping[str, str], slm_ids: Sequence[str]) -> str:
    content = json.dumps([boosters, list(slm_ids)], sort_keys=True).encode()
    return f"lgbm-{hashlib.sha256(content).hexdigest()[:12]}"


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
    """P(success) of logged outcomes; `fallback` where the artifact does not have the SLM."""
    rows = outcome_rows(outcomes, artifact.slm_ids)
    found = Heads(artifact).of_own(SUCCESS, rows)
    return np.where(np.isnan(found), fallback, found)


def answered(outcome: Outcome) -> bool:
    """Whether the outcome has the length of a complete answer."""
    return outcome.status == "ok" and outcome.engine.output_tokens > 0


def timed(outcome: Outcome) -> bool:
    """Whether its TTFT is only that of an awake SLM, without a wake-up or a failed attempt."""
    own = not outcome.timing.cold and not outcome.retries
    return answered(outcome) and own and (outcome.timing.ttft_s or 0.0) > 0.0


def success_metrics(
    artifact: Artifact, holdout: Sequence[Outcome], base_rate: float
) -> dict[str, Any]:
    """Log losses in nats, AUC and calibration error on labelled outcomes."""
    labels, weights = label_arrays(holdout)
    predicted = success_probabilities(artifact, holdout, base_rate)
    served = np.array(
        [o.decision.predicted.success_ratio if o.decision.predicted else base_rate for o in holdout]
    )
    return {
        "holdout_labelled": len(holdout),
        "log_loss": metrics.log_loss(labels, predicted, weights),
        "base_rate_log_loss": metrics.log_loss(labels, np.full(len(labels), base_rate), weights),
        "served_log_loss": metrics.log_loss(labels, served, weights),
        "auc": metrics.auc(labels, predicted, weights),
        "calibration_error": metrics.calibration_error(labels, predicted, weights),
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
        seen = np.array([o.timing.ttft_s or 0.0 for o in first_tokens])
        analytic = np.exp([o.decision.load_features[ANALYTIC_TTFT] for o in first_tokens])
        corrected = analytic * np.exp(np.clip(residual, -MAX_LOG_RESIDUAL, MAX_LOG_RESIDUAL))
        metrics["ttft_mae_s"] = float(np.mean(np.abs(seen - corrected)))
        metrics["analytic_ttft_mae_s"] = float(np.mean(np.abs(seen - analytic)))
    whole = [o for o in holdout if answered(o)]
    logs = heads.of_own(OUTPUT_TOKENS, outcome_rows(whole, artifact.slm_ids))
    known = ~np.isnan(logs)
    if known.any():
        lengths = np.array([o.engine.output_tokens for o in whole], dtype=np.float64)[known]
        mean = np.mean([o.engine.output_tokens for o in fit if answered(o)])
        metrics["output_tokens_mae"] = float(np.mean(np.abs(lengths - np.expm1(logs[known]))))
        metrics["mean_output_tokens_mae"] = float(np.mean(np.abs(lengths - mean)))
    return metrics
