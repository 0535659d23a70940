"""Predictors from score tables: the router reads them, and they are right on a known truth."""

from __future__ import annotations

import numpy as np
import pytest

from calm_serve.config import Goals
from calm_serve.datasets.fitting import (
    MIN_TRAIN_PROMPTS,
    fit_prompts,
    fit_table,
    labelled_prompts,
    predict_prompts,
    prompt_features,
)
from calm_serve.datasets.table import ScoreTable, TableRow, table_of
from calm_serve.errors import ConfigError
from calm_serve.prediction import Artifact, LightGBMPredictor, MetadataPrior
from calm_serve.requests import Overrides, parse_chat
from calm_serve.routing import ModelSelector
from calm_serve.testing import make_fleet, make_spec
from tests.score_tables import SUBJECTS, make_rows


def make_table(count: int = 240, **options: object) -> ScoreTable:
    return table_of([TableRow.model_validate(row) for row in make_rows(count, **options)])


def test_the_routers_first_decision_reads_a_fitted_predictor() -> None:
    blob = fit_table(make_table(), created_at=7.0).to_bytes()
    fleet = make_fleet(*(make_spec(model) for model in SUBJECTS))
    predictor = LightGBMPredictor.from_bytes(blob, MetadataPrior())
    selector = ModelSelector(fleet, Goals(exploration_ratio=0.0), predictor=predictor)
    for subject, text in SUBJECTS.items():
        request = parse_chat({"messages": [{"role": "user", "content": f"{text} 9000"}]})
        decision = selector.decide(request, Overrides(), subject)
        assert decision.slm_id == subject
        best = decision.candidates[0].prediction
        assert best is not None
        assert best.success_ratio > 0.75


def test_lengths_and_times_of_a_fitted_predictor_are_the_priors() -> None:
    artifact = fit_table(make_table(), created_at=7.0)
    assert {key.partition(":")[0] for key in artifact.boosters} <= {"success"}
    assert artifact.created_at == 7.0
    assert artifact.trained_on == 240 * 3


def test_equal_tables_give_equal_bytes() -> None:
    first, second = (fit_table(make_table(60), created_at=1.0).to_bytes() for _ in range(2))
    assert first == second


def test_the_metrics_are_of_rows_that_were_not_learned_from() -> None:
    rows = make_rows(300)
    for row in rows:
        row["split"] = "test" if row["prompt"].endswith(("0", "1", "2")) else "train"
    honest = fit_table(table_of([TableRow.model_validate(r) for r in rows]), created_at=0.0)
    assert honest.metrics["auc"] > 0.8
    assert honest.metrics["log_loss"] < 0.8 * honest.metrics["base_rate_log_loss"]
    for row in rows:
        if row["split"] == "test":
            row["scores"] = {model: 1.0 - score for model, score in row["scores"].items()}
    inverted = fit_table(table_of([TableRow.model_validate(r) for r in rows]), created_at=0.0)
    assert inverted.metrics["auc"] < 0.2


def test_predictions_for_many_prompts_are_those_of_the_router() -> None:
    table = make_table(80)
    labelled = labelled_prompts(table)
    artifact = fit_prompts(labelled, table.models, created_at=0.0)
    found = predict_prompts(artifact, table.models, labelled.features, labelled.means)
    predictor = LightGBMPredictor(artifact, MetadataPrior())
    one = predictor.of_prompt(labelled.features[5].numbers, labelled.features[5].buckets)
    assert found.shape == (80, 3)
    assert found[5].tolist() == [one[model][0] for model in table.models]


def test_columns_keep_their_order_whatever_the_ids_are() -> None:
    table = make_table(120)
    labelled = labelled_prompts(table)
    ids = ("model-9", "model-10", "a")
    artifact = fit_prompts(labelled, ids, created_at=0.0)
    found = predict_prompts(artifact, ids, labelled.features, labelled.means)
    assert np.mean(found.argmax(axis=1) == labelled.scores.argmax(axis=1)) > 0.7


def test_a_model_without_a_booster_has_its_mean() -> None:
    artifact = Artifact("v", ("a", "b"), {}, {}, 0, 0.0)
    features = labelled_prompts(make_table(20)).features
    found = predict_prompts(artifact, ("a", "b"), features, np.array([0.25, 0.75]))
    assert found.tolist() == [[0.25, 0.75]] * 20


def test_a_prompt_and_its_one_message_have_equal_features() -> None:
    prompt = TableRow(prompt="How many apples?", scores={"a": 1})
    message = {"role": "user", "content": "How many apples?"}
    assert prompt_features(prompt) == prompt_features(TableRow(messages=[message], scores={"a": 1}))


@pytest.mark.parametrize("name", ["org/model", "Model", "a b", "slm:adapter "])
def test_a_model_that_no_fleet_file_could_name_is_an_error(name: str) -> None:
    rows = [r | {"scores": {name: 1.0, "b": 0.0}} for r in make_rows(40)]
    with pytest.raises(ConfigError, match=f"model '{name}' cannot be the id of an SLM"):
        fit_table(table_of([TableRow.model_validate(row) for row in rows]), created_at=0.0)


def test_too_few_prompts_and_equal_scores_are_errors() -> None:
    with pytest.raises(ConfigError, match=f"a fit needs at least {MIN_TRAIN_PROMPTS}"):
        fit_table(make_table(MIN_TRAIN_PROMPTS), created_at=0.0)
    rows = [r | {"scores": {"a": 1.0, "b": 1.0}} for r in make_rows(60)]
    with pytest.raises(ConfigError, match="all scores are equal"):
        fit_table(table_of([TableRow.model_validate(row) for row in rows]), created_at=0.0)
