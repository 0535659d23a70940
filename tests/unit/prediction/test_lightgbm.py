"""Predictions from an artifact, and from the prior for what the artifact does not predict."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest

from calm_serve.errors import KnowledgeError
from calm_serve.learning.training import train
from calm_serve.prediction.artifact import (
    OUTPUT_TOKENS,
    SUCCESS,
    Artifact,
    load_artifact,
    own_head,
)
from calm_serve.prediction.base import MetadataPrior, live_load
from calm_serve.prediction.latency import analytic_ttft_s
from calm_serve.prediction.lightgbm import (
    LightGBMPredictor,
    load_rows,
    prompt_rows,
    slm_places,
)
from calm_serve.prediction.single_row import BUCKET_OFFSET, FIRST_BUCKET, FIRST_LOAD, SparseRow
from calm_serve.requests.features import BUCKETS, NUMBER_NAMES
from calm_serve.types import Residency
from tests.knowledge_data import (
    CODER,
    TALKER,
    make_context,
    make_outcome,
    make_spec,
    make_state,
    make_world,
)
from tests.unit.prediction.rows import dense

PRIOR = MetadataPrior()


@cache
def trained() -> Artifact:
    return train(
        make_world(400), (CODER, TALKER), seed=1, holdout_ratio=0.25, clock=lambda: 5.0
    ).artifact


def predictor(artifact: Artifact | None = None) -> LightGBMPredictor:
    return LightGBMPredictor(artifact or trained(), PRIOR)


def of(predicting: LightGBMPredictor, slm_ids: list[str], code: bool = True, **state: Any) -> Any:
    return predicting.predict(
        make_context(code),
        [make_spec(i) for i in slm_ids],
        [make_state(i, **state) for i in slm_ids],
    )


def test_the_prediction_equals_lightgbms_own() -> None:
    context, slm_ids = make_context(True), [TALKER, CODER]
    prompt = SparseRow()
    prompt.set_prompt(context.features.numbers, context.features.buckets)
    states = [make_state(i, waiting=3, cached_prefix_ratio=0.5) for i in slm_ids]
    got = predictor().predict(context, [make_spec(i) for i in slm_ids], states)
    for slm_id, state, prediction in zip(slm_ids, states, got, strict=True):
        row = np.zeros((1, len(NUMBER_NAMES) + BUCKETS + 7), dtype=np.float64)
        row[0, : len(NUMBER_NAMES)] = context.features.numbers
        row[0, [BUCKET_OFFSET + b for b in context.features.buckets]] = 1.0
        row[0, len(NUMBER_NAMES) + BUCKETS : -1] = live_load(context, make_spec(slm_id), state)
        row[0, -1] = trained().slm_ids.index(slm_id)
        raw = {
            head: lgb.Booster(model_str=text).predict(row, raw_score=True)[0]
            for head, text in trained().boosters.items()
        }
        analytic = analytic_ttft_s(make_spec(slm_id), state, context.prompt_tokens, 0.5)
        start = trained().starts[slm_id][trained().pseudo_tasks.of_prompt(prompt)]
        logit = start + raw.get(own_head(SUCCESS, slm_id), 0.0)
        assert prediction.success_ratio == pytest.approx(1.0 / (1.0 + np.exp(-logit)), abs=1e-12)
        tokens = np.expm1(raw[own_head(OUTPUT_TOKENS, slm_id)])
        assert prediction.output_tokens == pytest.approx(tokens, rel=1e-12)
        assert prediction.ttft_s == pytest.approx(
            analytic * np.exp(raw["ttft_residual"]), rel=1e-12
        )


def test_content_decides_which_slm_is_expected_to_succeed() -> None:
    coder, talker = of(predictor(), [CODER, TALKER], code=True)
    assert coder.success_ratio > 0.8
    assert talker.success_ratio < 0.3
    coder, talker = of(predictor(), [CODER, TALKER], code=False)
    assert coder.success_ratio < 0.3
    assert talker.success_ratio > 0.8


def test_load_does_not_change_what_an_slm_can_do() -> None:
    (idle,) = of(predictor(), [CODER])
    (busy,) = of(predictor(), [CODER], running=8, waiting=20, kv_usage_ratio=0.9)
    assert busy.success_ratio == idle.success_ratio
    assert busy.output_tokens == idle.output_tokens
    assert busy.ttft_s > idle.ttft_s


def test_a_slow_slm_is_predicted_slower_than_the_analytic_model() -> None:
    (prediction,) = of(predictor(), [TALKER])
    analytic = analytic_ttft_s(make_spec(TALKER), make_state(TALKER), 100)
    assert prediction.ttft_s == pytest.approx(3 * analytic, rel=0.1)


def test_what_was_measured_lately_scales_the_ttft_and_widens_it() -> None:
    (usual,) = of(predictor(), [TALKER])
    (slow,) = of(predictor(), [TALKER], ttft_ratio=2.0, ttft_spread=0.3, e2e_spread=0.4)
    assert slow.ttft_s == pytest.approx(2.0 * usual.ttft_s)
    assert (slow.ttft_spread, slow.e2e_spread) == (0.3, 0.4)


def test_waking_up_is_added_and_not_scaled() -> None:
    (awake,) = of(predictor(), [TALKER])
    (cold,) = of(predictor(), [TALKER], residency=Residency.COLD, wake_s=50.0)
    assert cold.ttft_s == pytest.approx(awake.ttft_s + 50.0)


def test_energy_is_tokens_times_measured_joules() -> None:
    (prior_rate,) = of(predictor(), [CODER])
    (measured,) = of(predictor(), [CODER], energy_j_per_token=2.0)
    assert measured.energy_j == pytest.approx(2.0 * measured.output_tokens)
    priors = make_spec(CODER).priors
    assert prior_rate.energy_j == pytest.approx(
        priors.energy_j_per_token * prior_rate.output_tokens
    )


def test_the_clients_token_limit_bounds_the_predicted_length() -> None:
    (prediction,) = predictor().predict(
        make_context(False, max_output_tokens=5), [make_spec(TALKER)], [make_state(TALKER)]
    )
    assert prediction.output_tokens == 5.0


def test_an_unseen_slm_keeps_its_prior_among_seen_ones() -> None:
    got = of(predictor(), ["stranger", CODER])
    assert got[0] == of(predictor(), ["stranger"])[0]
    assert (
        got[0]
        == PRIOR.predict(make_context(True), [make_spec("stranger")], [make_state("stranger")])[0]
    )
    assert got[1] == of(predictor(), [CODER])[0]


def test_calls_do_not_leak_into_one_another() -> None:
    predicting = predictor()
    first = of(predicting, [CODER, TALKER], code=True)
    of(predicting, [TALKER], code=False, waiting=9)
    assert of(predicting, [CODER, TALKER], code=True) == first


def test_a_missing_head_is_answered_by_the_prior() -> None:
    bare = replace(trained(), boosters={}, starts={})
    (prediction,) = of(predictor(bare), [CODER])
    priors = make_spec(CODER).priors
    assert prediction.success_ratio == priors.quality
    assert prediction.output_tokens == priors.output_tokens


def test_an_slm_without_labels_does_not_win_by_its_prior() -> None:
    boast = make_spec("new").model_copy(
        update={"priors": make_spec("new").priors.model_copy(update={"quality": 0.99})}
    )
    specs = [make_spec(CODER), make_spec(TALKER), boast]
    states = [make_state(s.id) for s in specs]
    coder, talker, new = predictor().predict(make_context(True), specs, states)
    assert new.success_ratio == pytest.approx((coder.success_ratio + talker.success_ratio) / 2)
    tried = LightGBMPredictor(trained(), PRIOR, tried=frozenset({"new"}))
    assert tried.predict(make_context(True), specs, states)[2].success_ratio == 0.99


def test_rows_from_the_log_equal_rows_at_prediction() -> None:
    predicting, context = predictor(), make_context(True)
    spec, state = make_spec(TALKER), make_state(TALKER, waiting=2)
    predicting.predict(context, [spec], [state])
    logged = make_outcome(
        "a",
        slm_id=TALKER,
        numbers=context.features.numbers,
        buckets=context.features.buckets,
        load_features=live_load(context, spec, state),
    )
    (prompt,) = prompt_rows([logged]).toarray()
    assert np.array_equal(prompt[:FIRST_LOAD], dense(predicting._prompt_row)[:FIRST_LOAD])
    assert not prompt[FIRST_LOAD:].any()
    (load,) = load_rows([logged], trained().slm_ids).toarray()
    assert np.array_equal(load, dense(predicting._load_row))
    assert not load[FIRST_BUCKET:FIRST_LOAD].any()
    places = slm_places([logged, replace(logged, slm_id="gone")], trained().slm_ids)
    assert places.tolist() == [trained().slm_ids.index(TALKER), -1]


def test_an_artifact_survives_the_wire_byte_for_byte() -> None:
    blob = trained().to_bytes()
    assert Artifact.from_bytes(blob) == trained()
    assert Artifact.from_bytes(blob).to_bytes() == blob
    assert LightGBMPredictor.from_bytes(blob, PRIOR).version.champion == trained().version


def changed(**values: Any) -> bytes:
    data = json.loads(zlib.decompress(trained().to_bytes()))
    return zlib.compress(json.dumps({**data, **values}).encode())


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "not a predictor"),
        (b"garbage", "not a predictor"),
        (zlib.compress(b"[]"), "not a predictor"),
        (zlib.compress(b"{}"), "not a predictor"),
        (changed(format=99), "format 99"),
        (changed(features={"numbers": []}), "feature layout"),
        (changed(boosters=None), "not a predictor"),
    ],
)
def test_bytes_that_are_no_usable_artifact_are_refused(blob: bytes, message: str) -> None:
    with pytest.raises(KnowledgeError, match=message):
        Artifact.from_bytes(blob)


def test_a_truncated_booster_is_refused() -> None:
    broken = replace(trained(), boosters={own_head(SUCCESS, CODER): "tree\n"})
    with pytest.raises(KnowledgeError, match="success"):
        predictor(broken)


def test_a_missing_artifact_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match=r"predictor\.bin"):
        load_artifact(tmp_path / "predictor.bin")
