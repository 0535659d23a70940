"""Training: outcomes in time order become a predictor, measured on the newest, held-out share.

P(success) of an SLM starts from its rate of successes in the prompt's pseudo-task, shrunk towards
the rate that its mean and the difficulty of the group would give (empirical Bayes). Its booster
learns what the start leaves, and has no trees where they would not predict better. The predictor
that is measured never saw the held-out share; the one that is published (`refitted`) did.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from calm_serve.errors import KnowledgeError
from calm_serve.learning import metrics
from calm_serve.learning.labels import quality_label
from calm_serve.prediction import (
    COLUMNS,
    LOAD_NAMES,
    MAX_LOG_RESIDUAL,
    OUTPUT_TOKENS,
    SLM_COLUMN,
    SUCCESS,
    TTFT_RESIDUAL,
    Artifact,
    Heads,
    Places,
    PseudoTasks,
    Rows,
    Values,
    find_pseudo_tasks,
    fit_seen_prompts,
    fits_layout,
    load_rows,
    own_head,
    probabilities,
    prompt_rows,
    slm_places,
)
from calm_serve.types import DecisionPath, Outcome

ANALYTIC_TTFT = LOAD_NAMES.index("log_analytic_ttft")

MIN_LABELLED = 20  # labelled outcomes; with fewer nothing is trained
MIN_LABELLED_PER_SLM = 5  # an SLM with fewer keeps its prior
# Boosting rounds at the learning rate of _PARAMS; a higher rate takes proportionally fewer.
MAX_ROUNDS = 150
DEFAULT_ROUNDS = 40  # with too few rows to choose the number
TUNING_PART = 5  # the newest 1 / TUNING_PART of the rows choose the number of rounds
MIN_TUNING_ROWS = 20
START_DIGITS = 4  # of a stored logit
TRAINED_UNTIL = "trained_until"  # metric of a refitted artifact: Unix time of its newest outcome
PATIENCE_ROUNDS = 15  # boosting stops after this many rounds without improvement on the tuning rows

# Starts of P(success). The prior of a group's difficulty is normal, of this precision (1/logit^2).
DIFFICULTY_PRECISION = 1.0
NEWTON_STEPS = 8
# Bounds of the share of an SLM's variance that lies between groups: it is never certain that the
# groups do not differ, nor that answers within a group are equal.
MIN_BETWEEN, MAX_BETWEEN = 1e-3, 0.95
FOLDS = 5  # a row's start in training comes from the other folds' labels

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


_COLUMN_LINES = re.compile(r"^(feature_names|feature_infos)=.*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Training:
    """A trained predictor and the held-out labelled outcomes."""

    artifact: Artifact
    holdout: tuple[Outcome, ...]
    base_rate: float  # mean label of the training share
    mean_labels: Mapping[str, float]  # the same by SLM

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
    seen_until: float | None = None,
) -> Training:
    """Train on the older outcomes and measure on the newest `holdout_ratio` of labelled ones.

    `seen_until`: a champion has learned from the outcomes up to this Unix time. Then at most half
    of the later labels are held out; without any the holdout is one row, too few for a comparison.
    Unlabelled outcomes are used for answer length and TTFT. Outcomes of SLMs outside `slm_ids`, of
    another feature layout, and of requests that were turned away are ignored. Equal input, seed and
    clock give equal bytes. Raises KnowledgeError when there are fewer than MIN_LABELLED labelled
    outcomes, or no SLM has enough.
    """
    split = _split(outcomes, set(slm_ids), holdout_ratio, seen_until)
    known = _known_slms(split.fit)
    if not known:
        raise KnowledgeError(f"no SLM has {MIN_LABELLED_PER_SLM} labelled outcomes to train on")
    fit = [o for o in split.fit if o.slm_id in known]
    labels, weights = label_arrays([o for o in fit if quality_label(o.signals)])
    base_rate = float(np.average(labels, weights=weights))
    artifact = _artifact(fit, known, seed, split.labelled_fit, clock())
    metrics = {
        "fit_outcomes": len(fit),
        "fit_until": split.holdout[0].at,
        "base_rate": base_rate,
        **success_metrics(artifact, split.labelled_holdout, base_rate),
        **regression_metrics(artifact, [o for o in split.holdout if o.slm_id in known], fit),
    }
    means = _mean_labels(fit, known)
    return Training(replace(artifact, metrics=metrics), split.labelled_holdout, base_rate, means)


def without_prompts(training: Training) -> Artifact:
    """The trained artifact with each SLM's mean label as its P(success), whatever the prompt."""
    found = _constant_success(training.artifact, training.mean_labels)
    own = success_metrics(found, training.holdout, training.base_rate)
    return replace(found, metrics={**training.metrics, **own})


def _constant_success(artifact: Artifact, means: Mapping[str, float]) -> Artifact:
    logits = _logits(np.array(list(means.values()))).tolist()
    found = replace(
        artifact,
        boosters={k: v for k, v in artifact.boosters.items() if not k.startswith(SUCCESS)},
        starts={slm: (round(v, START_DIGITS),) for slm, v in zip(means, logits, strict=True)},
        pseudo_tasks=None,
    )
    return replace(found, version=f"mean-{found.content_hash()}")


def refitted(
    training: Training,
    outcomes: Sequence[Outcome],
    *,
    seed: int,
    clock: Callable[[], float],
    means_only: bool = False,
) -> Artifact:
    """The same training on all outcomes, the held-out ones too: what is published.

    With `means_only` P(success) is each SLM's mean label. The metrics are those of the held-out
    share before the refit, with the time of the newest outcome (TRAINED_UNTIL). Raises
    KnowledgeError as `train`.
    """
    usable = _usable(outcomes, set(training.artifact.slm_ids))
    known = _known_slms(usable)
    labelled = sum(quality_label(o.signals) is not None for o in usable)
    artifact = _artifact(usable, known, seed, labelled, clock())
    metrics = {**training.metrics, TRAINED_UNTIL: usable[-1].at, "fit_outcomes": len(usable)}
    if means_only:
        artifact = _constant_success(artifact, _mean_labels(usable, known))
    return replace(artifact, metrics=metrics)


def _artifact(
    fit: Sequence[Outcome], slm_ids: tuple[str, ...], seed: int, labels: int, now: float
) -> Artifact:
    heads = fit_heads(fit, slm_ids, seed)
    artifact = Artifact(
        version="",
        slm_ids=slm_ids,
        boosters=heads.boosters,
        metrics={},
        trained_on=labels,
        created_at=now,
        starts=heads.starts,
        pseudo_tasks=heads.pseudo_tasks,
        seen=fit_seen_prompts(o.features.bits for o in fit if _teaches_choice(o)),
    )
    return replace(artifact, version=f"lgbm-{artifact.content_hash()}")


def _usable(outcomes: Sequence[Outcome], slm_ids: set[str]) -> list[Outcome]:
    """Answered outcomes of `slm_ids` in the present feature layout, oldest first."""
    found = (
        o for o in outcomes if o.slm_id in slm_ids and o.status != "rejected" and fits_layout(o)
    )
    return sorted(found, key=lambda o: (o.at, o.outcome_id))


def _split(
    outcomes: Sequence[Outcome], slm_ids: set[str], holdout_ratio: float, seen_until: float | None
) -> _Split:
    usable = _usable(outcomes, slm_ids)
    labelled = [i for i, o in enumerate(usable) if quality_label(o.signals)]
    if len(labelled) < MIN_LABELLED:
        raise KnowledgeError(
            f"{len(labelled)} labelled outcomes, training needs at least {MIN_LABELLED}"
        )
    held_out = round(len(labelled) * holdout_ratio)
    if seen_until is not None:
        # Half of what the champion has not seen: both are compared on it, and the challenger has
        # learned from the other half.
        held_out = min(held_out, sum(usable[i].at > seen_until for i in labelled) // 2)
    held_out = min(max(held_out, 1), len(labelled) - 1)
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


@dataclass(frozen=True, slots=True)
class FittedHeads:
    """What a training gives: boosters by head, and starts of P(success) by SLM and pseudo-task."""

    boosters: dict[str, str]
    starts: dict[str, tuple[float, ...]]  # logits
    pseudo_tasks: PseudoTasks | None  # None: one group of all prompts


def fit_heads(
    fit: Sequence[Outcome], slm_ids: Sequence[str], seed: int, *, grouped: bool = True
) -> FittedHeads:
    """The heads of `slm_ids`; those without data are absent.

    Without `grouped` all prompts are one group: that is for few outcomes.
    """
    boosters: dict[str, str] = {}
    starts: dict[str, tuple[float, ...]] = {}
    tasks: PseudoTasks | None = None
    labelled = [o for o in fit if quality_label(o.signals)]
    labels, weights = label_arrays(labelled)
    # From equal labels nothing can be learned, so the prior is used.
    if len(set(labels.tolist())) > 1:
        rows = prompt_rows(labelled)
        tasks = find_pseudo_tasks(rows, seed) if grouped else None
        groups = np.zeros(len(labelled), dtype=np.int64) if tasks is None else tasks.of_rows(rows)
        data = _Labelled(slm_places(labelled, slm_ids), groups, labels, weights)
        size = (1 if tasks is None else len(tasks), len(slm_ids))
        final = _starts(data, *size)
        own = _out_of_fold(data, *size) if size[0] > 1 else final[groups, data.slms]
        for index, slm_id in enumerate(slm_ids):
            mine = data.slms == index
            if not mine.any():
                continue
            starts[slm_id] = tuple(round(v, START_DIGITS) for v in final[:, index].tolist())
            smoothed = _smoothed(labels[mine], float(mine.sum()))
            args = (rows[mine], smoothed, weights[mine], seed, _OWN_PARAMS)
            if text := _fit("cross_entropy", *args, own[mine]):
                boosters[own_head(SUCCESS, slm_id)] = text
    boosters |= _fit_lengths([o for o in fit if answered(o)], slm_ids, seed)
    if first_tokens := [o for o in fit if timed(o)]:
        rows = load_rows(first_tokens, slm_ids)
        target = _log_residuals(first_tokens)
        boosters[TTFT_RESIDUAL] = _fit("regression", rows, target, None, seed, _COARSE)
    return FittedHeads(boosters, starts, tasks)


def _fit_lengths(whole: Sequence[Outcome], slm_ids: Sequence[str], seed: int) -> dict[str, str]:
    """A booster of the answer's length for each SLM with complete answers."""
    if not whole:
        return {}
    rows, slms = prompt_rows(whole), slm_places(whole, slm_ids)
    lengths = np.log1p(np.array([o.engine.output_tokens for o in whole], dtype=np.float64))
    params = {**_OWN_PARAMS, **_COARSE}
    return {
        own_head(OUTPUT_TOKENS, slm_id): _fit(
            "regression", rows[slms == index], lengths[slms == index], None, seed, params
        )
        for index, slm_id in enumerate(slm_ids)
        if (slms == index).any()
    }


@dataclass(frozen=True, slots=True)
class _Labelled:
    """Labelled outcomes in columns: SLM, pseudo-task, label, weight."""

    slms: Places
    groups: NDArray[np.int64]
    labels: Values
    weights: Values

    def where(self, chosen: NDArray[np.bool_]) -> _Labelled:
        """The chosen rows."""
        return _Labelled(
            self.slms[chosen], self.groups[chosen], self.labels[chosen], self.weights[chosen]
        )


def _starts(data: _Labelled, groups: int, slms: int) -> Values:
    """Logits of P(success), (groups, slms): each SLM's rate in each group, shrunk.

    The prior of a cell is what the SLM's mean and the group's difficulty give together. Its
    strength, in labels, follows from how much the SLM's rates differ between groups (method of
    moments of the beta-binomial distribution).
    """
    means = np.zeros(slms)
    for index in range(slms):
        mine = data.slms == index
        weights = data.weights[mine]
        mean = np.average(data.labels[mine], weights=weights) if mine.any() else 0.5
        means[index] = _smoothed(mean, float(weights.sum()))
    prior = _logits(means)[None, :] + _difficulties(data, _logits(means), groups)[:, None]
    found = np.empty((groups, slms))
    for index in range(slms):
        mine, p = data.slms == index, probabilities(prior[:, index])
        where, weights = data.groups[mine], data.weights[mine]
        count = np.bincount(where, weights, minlength=groups)
        squares = np.bincount(where, weights**2, minlength=groups)
        successes = np.bincount(where, weights * data.labels[mine], minlength=groups)
        variance = p * (1.0 - p)
        beyond = np.sum((successes - count * p) ** 2 - squares * variance)
        possible = np.sum((count**2 - squares) * variance)
        between = beyond / possible if possible > 0.0 else 0.0
        strength = 1.0 / min(max(between, MIN_BETWEEN), MAX_BETWEEN) - 1.0
        found[:, index] = _logits((successes + strength * p) / (count + strength))
    return found


def _difficulties(data: _Labelled, means: Values, groups: int) -> Values:
    """What each group adds to the logits of all SLMs alike, (groups,)."""
    found = np.zeros(groups)
    if groups == 1:
        return found
    for _ in range(NEWTON_STEPS):
        p = probabilities(means[data.slms] + found[data.groups])
        error = np.bincount(data.groups, data.weights * (data.labels - p), minlength=groups)
        slope = np.bincount(data.groups, data.weights * p * (1.0 - p), minlength=groups)
        found += (error - DIFFICULTY_PRECISION * found) / (slope + DIFFICULTY_PRECISION)
    return found


def _out_of_fold(data: _Labelled, groups: int, slms: int) -> Values:
    """Each row's start as it would be without its own label and those of its fold, (n,)."""
    folds = np.arange(len(data.labels)) % FOLDS
    found = np.empty(len(folds))
    for fold in range(FOLDS):
        own = folds == fold
        starts = _starts(data.where(~own), groups, slms)
        found[own] = starts[data.groups[own], data.slms[own]]
    return found


def _logits(p: Values) -> Values:
    clipped = np.clip(p, metrics.CLIP, 1.0 - metrics.CLIP)
    found: Values = np.log(clipped / (1.0 - clipped))
    return found


def _smoothed(labels: Any, count: float) -> Any:
    """Rule of succession: a few equal labels must not give a P(success) of 0 or 1."""
    return (labels * count + 0.5) / (count + 1.0)


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
    own: Mapping[str, Any],
    start: Values | None = None,
) -> str:
    """Train one booster: the newest rows choose the number of rounds, then all rows are used.

    "" with a `start` that no round improves on.
    """
    params = {**_PARAMS, **own, "objective": objective, "seed": seed}
    rate_ratio = _PARAMS["learning_rate"] / params["learning_rate"]
    rounds = round(DEFAULT_ROUNDS * rate_ratio)
    count = rows.shape[0]
    cut = count - count // TUNING_PART
    if count - cut >= MIN_TUNING_ROWS:
        older, newer = slice(cut), slice(cut, None)
        first = _dataset(rows, target, weights, start, older)
        tuned = lgb.train(
            params,
            first,
            num_boost_round=round(MAX_ROUNDS * rate_ratio),
            valid_sets=[_dataset(rows, target, weights, start, newer, first)],
            callbacks=[lgb.early_stopping(PATIENCE_ROUNDS, verbose=False)],
        )
        rounds = max(tuned.best_iteration, 1)
        if start is not None:
            p = probabilities(start[newer])
            without = metrics.log_loss(target[newer], p, _part(weights, newer, p))
            if tuned.best_score["valid_0"]["cross_entropy"] >= without:
                return ""
    whole = _dataset(rows, target, weights, start, slice(None))
    return _without_names(lgb.train(params, whole, num_boost_round=rounds).model_to_string())


def _without_names(text: str) -> str:
    """A text model whose thousands of columns have no names and no ranges, for its size.

    LightGBM counts the names and ranges when it loads a model, and predicts without them.
    """
    return _COLUMN_LINES.sub(lambda line: f"{line[1]}={' '.join(['none'] * COLUMNS)}", text)


def _part(values: Values | None, part: slice, like: Values) -> Values:
    return np.ones_like(like) if values is None else values[part]


def _dataset(
    rows: Rows,
    target: Values,
    weights: Values | None,
    start: Values | None,
    part: slice,
    reference: lgb.Dataset | None = None,
) -> lgb.Dataset:
    return lgb.Dataset(
        rows[part],
        label=target[part],
        weight=None if weights is None else weights[part],
        init_score=None if start is None else start[part],
        reference=reference,
        categorical_feature=[SLM_COLUMN],
        params={"verbosity": -1, "max_bin": _PARAMS["max_bin"]},
    )


def _teaches_choice(outcome: Outcome) -> bool:
    """Whether the prompt is familiar once it was trained on.

    An unfamiliar prompt is answered by a generalist alone. Its label says nothing about the other
    SLMs, so it stays unfamiliar: otherwise the next predictor would give it to one of them.
    """
    chosen_blindly = outcome.decision.path == DecisionPath.UNFAMILIAR
    return not chosen_blindly and quality_label(outcome.signals) is not None


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
    places = slm_places(outcomes, artifact.slm_ids)
    found = probabilities(Heads(artifact).success_logits(prompt_rows(outcomes), places))
    return np.where(np.isnan(found), fallback, found)


def _mean_labels(fit: Sequence[Outcome], slm_ids: Sequence[str]) -> dict[str, float]:
    labelled = [o for o in fit if quality_label(o.signals)]
    labels, weights = label_arrays(labelled)
    places = slm_places(labelled, slm_ids)
    return {
        slm: float(np.average(labels[places == i], weights=weights[places == i]))
        for i, slm in enumerate(slm_ids)
    }


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
    residual = heads.residuals(load_rows(first_tokens, artifact.slm_ids)) if first_tokens else None
    if residual is not None:
        seen = np.array([o.timing.ttft_s or 0.0 for o in first_tokens])
        analytic = np.exp([o.decision.load_features[ANALYTIC_TTFT] for o in first_tokens])
        corrected = analytic * np.exp(np.clip(residual, -MAX_LOG_RESIDUAL, MAX_LOG_RESIDUAL))
        metrics["ttft_mae_s"] = float(np.mean(np.abs(seen - corrected)))
        metrics["analytic_ttft_mae_s"] = float(np.mean(np.abs(seen - analytic)))
    whole = [o for o in holdout if answered(o)]
    logs = heads.of_own(OUTPUT_TOKENS, prompt_rows(whole), slm_places(whole, artifact.slm_ids))
    known = ~np.isnan(logs)
    if known.any():
        lengths = np.array([o.engine.output_tokens for o in whole], dtype=np.float64)[known]
        mean = np.mean([o.engine.output_tokens for o in fit if answered(o)])
        metrics["output_tokens_mae"] = float(np.mean(np.abs(lengths - np.expm1(logs[known]))))
        metrics["mean_output_tokens_mae"] = float(np.mean(np.abs(lengths - mean)))
    return metrics
