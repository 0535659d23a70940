"""Predictors from score tables: every score is an outcome with feedback, learned as any other.

A table has no timings and no lengths, so the predictor has the P(success) of each model alone; the
fleet's priors and what is measured give the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calm_serve.config import Fleet, SLMSpec
from calm_serve.datasets.table import ScoreTable, TableRow, Values
from calm_serve.errors import ConfigError
from calm_serve.learning import auc, calibration_error, log_loss, train
from calm_serve.prediction import LOAD_NAMES, Artifact, LightGBMPredictor, MetadataPrior
from calm_serve.requests import ContextBuilder, Overrides, fill_features, parse_chat
from calm_serve.types import (
    FEEDBACK,
    DecisionSummary,
    EngineFacts,
    Outcome,
    PromptFeatures,
    QualitySignal,
    Timing,
)

# With fewer prompts nothing is learned that a mean would not say: `calm eval` shows it as a
# learning curve that starts at the best single model's score.
MIN_TRAIN_PROMPTS = 20
SEED = 0  # equal tables give equal artifacts


@dataclass(frozen=True, slots=True)
class LabelledPrompts:
    """What a fit reads of a table: features of the prompts, and scores of shape [rows, models]."""

    features: tuple[PromptFeatures, ...]
    scores: Values

    def part(self, places: Sequence[int]) -> LabelledPrompts:
        """The prompts at these places."""
        return LabelledPrompts(tuple(self.features[i] for i in places), self.scores[places])

    @property
    def means(self) -> Values:
        """Mean score of each model, of shape [models]."""
        return np.asarray(self.scores.mean(axis=0))


def labelled_prompts(table: ScoreTable) -> LabelledPrompts:
    """Read the features of all prompts; 0.2 to 0.5 ms each."""
    return LabelledPrompts(tuple(map(prompt_features, table.rows)), table.scores)


def prompt_features(row: TableRow) -> PromptFeatures:
    """The features of a prompt as the router reads them, without a fleet file's markers.

    Their number is then 0 in all rows, and a constant column is never split.
    """
    request = parse_chat(row.body())
    context = _BUILDER.build(request, Overrides(), "")
    fill_features(context, request)
    return context.features


_BUILDER = ContextBuilder(Fleet(slms=(SLMSpec(id="any", model="any"),)))


def fit_prompts(
    labelled: LabelledPrompts, slm_ids: Sequence[str], *, created_at: float, seed: int = SEED
) -> Artifact:
    """Fit a predictor of `slm_ids`, which run parallel to the scores' columns.

    `created_at` is Unix time in seconds. Blocks for 0.1 ms to 1 ms per score. Equal input gives
    equal boosters. Raises ConfigError for fewer than MIN_TRAIN_PROMPTS prompts.
    """
    count = len(labelled.features)
    if count < MIN_TRAIN_PROMPTS:
        raise ConfigError(
            f"{count} prompts to learn from, a fit needs at least {MIN_TRAIN_PROMPTS}"
        )
    # The last rows choose the number of boosting rounds, so they must be a random sample.
    order = np.random.default_rng(seed).permutation(count)
    outcomes = _outcomes(labelled.part(order.tolist()), slm_ids)
    # Of a log a share of the newest is held out; here the caller has a test of his own, and one
    # score is the least that is held out.
    training = train(outcomes, slm_ids, seed=seed, holdout_ratio=0.0, clock=lambda: created_at)
    return replace(training.artifact, metrics={}, trained_on=labelled.scores.size)


def predict_prompts(
    artifact: Artifact,
    slm_ids: Sequence[str],
    features: Iterable[PromptFeatures],
    fallback: Values,
) -> Values:
    """P(success) of every model for every prompt, [rows, models], as the router computes it.

    `slm_ids` are those of the fit, in its order. `fallback`, of shape [models], is used for a model
    whose P(success) the artifact does not have.
    """
    predictor = LightGBMPredictor(artifact, MetadataPrior())
    rows = [_probabilities(predictor, one, slm_ids, fallback) for one in features]
    return np.array(rows, dtype=np.float64).reshape(-1, len(slm_ids))


def fit_table(table: ScoreTable, *, created_at: float) -> Artifact:
    """Fit a predictor on the whole table, for a fleet whose SLMs have the models' names.

    Its metrics are those of a predictor that is fitted on the train rows alone, on the test rows.
    Raises ConfigError when a model's name cannot be an SLM's, or there are too few prompts.
    """
    for model in table.models:
        _check_name(model)
    labelled = labelled_prompts(table)
    fitted = labelled.part(np.flatnonzero(~table.tests).tolist())
    test = labelled.part(np.flatnonzero(table.tests).tolist())
    if np.ptp(table.scores) == 0.0:
        raise ConfigError("all scores are equal: there is nothing to learn")
    if not test.features:
        raise ConfigError("no prompt to test on: the table is too short")
    tested = fit_prompts(fitted, table.models, created_at=created_at)
    predicted = predict_prompts(tested, table.models, test.features, fitted.means)
    whole = fit_prompts(labelled, table.models, created_at=created_at)
    return replace(whole, metrics=success_metrics(predicted, test, fitted))


def success_metrics(
    predicted: Values, test: LabelledPrompts, fitted: LabelledPrompts
) -> dict[str, Any]:
    """Log losses in nats, AUC and calibration error of predictions, over all models.

    The base rate is that of the prompts that were fitted on.
    """
    labels, found = test.scores.ravel(), predicted.ravel()
    weights = np.ones(len(labels))
    base_rate = float(fitted.scores.mean())
    return {
        "holdout_labelled": len(labels),
        "base_rate": base_rate,
        "log_loss": log_loss(labels, found, weights),
        "base_rate_log_loss": log_loss(labels, np.full(len(labels), base_rate), weights),
        "auc": auc(labels, found, weights),
        "calibration_error": calibration_error(labels, found, weights),
    }


def _outcomes(labelled: LabelledPrompts, slm_ids: Sequence[str]) -> list[Outcome]:
    timing = Timing(cold=True)  # keeps it out of the TTFT residuals
    engine = EngineFacts()  # without output tokens: keeps it out of the lengths
    decision = DecisionSummary(load_features=(0.0,) * len(LOAD_NAMES))
    return [
        Outcome(
            outcome_id=f"{number}-{slm_id}",
            slm_id=slm_id,
            at=float(number),
            features=features,
            timing=timing,
            engine=engine,
            decision=decision,
            signals=(QualitySignal(FEEDBACK, float(score)),),
        )
        for number, features in enumerate(labelled.features)
        for slm_id, score in zip(slm_ids, labelled.scores[number], strict=True)
    ]


def _probabilities(
    predictor: LightGBMPredictor,
    features: PromptFeatures,
    slm_ids: Sequence[str],
    fallback: Values,
) -> list[float]:
    found = predictor.of_prompt(features.numbers, features.buckets)
    chances = [found.get(slm_id, (None, None))[0] for slm_id in slm_ids]
    return [
        float(mean) if chance is None else chance
        for chance, mean in zip(chances, fallback, strict=True)
    ]


def _check_name(model: str) -> None:
    """Raise ConfigError unless the model's name can be an SLM's id."""
    try:
        SLMSpec(id=model, model="any")
    except ValueError as error:
        raise ConfigError(
            f"model {model!r} cannot be the id of an SLM: an id has lower-case letters, digits "
            "and ._- ; name the table's models as the fleet file does"
        ) from error
