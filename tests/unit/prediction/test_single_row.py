"""A row through LightGBM's C API gives the result of `Booster.predict`."""

from __future__ import annotations

import gc
import math
from functools import cache
from random import Random

import lightgbm as lgb
import numpy as np
import pytest

from calm_serve.errors import KnowledgeError
from calm_serve.prediction.base import LOAD_NAMES
from calm_serve.prediction.single_row import (
    COLUMNS,
    FIRST_BUCKET,
    FIRST_LOAD,
    SLM_COLUMN,
    SingleRow,
    SparseRow,
    joined,
)
from calm_serve.requests.features import BUCKETS, NUMBER_NAMES
from calm_serve.types import FIRST_WORD
from tests.unit.prediction.rows import dense

WORDS = 1000  # of the buckets that occur in training
LAST_WORD = FIRST_BUCKET + WORDS
IDS = range(FIRST_WORD, FIRST_WORD + BUCKETS)
MISSING = (math.nan, -1.0, 99.0)  # categories that training never saw


@cache
def booster(missing: bool) -> lgb.Booster:
    """Trees over every kind of column, trained with or without missing values."""
    draw = np.random.default_rng(4)
    rows = draw.normal(size=(600, COLUMNS)).astype(np.float32)
    rows[:, FIRST_BUCKET:FIRST_LOAD] = 0.0
    rows[:, FIRST_BUCKET:LAST_WORD] = draw.random((600, WORDS)) < 0.2
    rows[:, SLM_COLUMN] = draw.integers(0, 6, size=600)
    target = rows[:, 0] + 2 * rows[:, 40] - rows[:, -3] + (rows[:, -1] % 3) + rows[:, 41:90].sum(1)
    if missing:
        for part in (rows[:, :LAST_WORD], rows[:, FIRST_LOAD:]):
            part[draw.random(part.shape) < 0.1] = np.nan
    data = lgb.Dataset(rows, target, categorical_feature=[SLM_COLUMN])
    params = {"verbosity": -1, "num_leaves": 15, "num_threads": 1, "max_cat_to_onehot": 2}
    return lgb.train(params, data, num_boost_round=60)


@pytest.mark.parametrize("missing", [False, True])
def test_it_equals_booster_predict(missing: bool) -> None:
    rng, row = Random(1), SparseRow()
    one = SingleRow(booster(missing), row)
    for _ in range(300):
        numbers = [rng.choice((0.0, rng.gauss(0, 3), math.nan, -0.0)) for _ in NUMBER_NAMES]
        load = [rng.choice((0.0, rng.gauss(0, 3), math.nan)) for _ in LOAD_NAMES]
        row.set_prompt(numbers, sorted(rng.sample(IDS, rng.choice((0, 1, 90, BUCKETS)))))
        for category in (*range(6), *MISSING):
            row.set_candidate(category, load)
            expected = booster(missing).predict(dense(row)[None], num_threads=1)[0]
            assert one.predict()[0] == pytest.approx(expected, abs=1e-9)


def test_the_row_contains_the_last_values_and_nothing_older() -> None:
    row = SparseRow()
    row.set_prompt([1.0] * len(NUMBER_NAMES), IDS)
    row.set_candidate(3, [2.0] * len(LOAD_NAMES))
    row.set_prompt(range(len(NUMBER_NAMES)), [IDS[0], IDS[-1]])
    row.set_candidate(1, range(len(LOAD_NAMES)))
    values = dense(row)
    assert values[: len(NUMBER_NAMES)].tolist() == list(range(len(NUMBER_NAMES)))
    buckets = values[len(NUMBER_NAMES) : len(NUMBER_NAMES) + BUCKETS]
    assert np.flatnonzero(buckets).tolist() == [0, BUCKETS - 1]
    assert values[-len(LOAD_NAMES) - 1 :].tolist() == [*range(len(LOAD_NAMES)), 1.0]


def test_boosters_share_a_row_and_outlive_their_names() -> None:
    row = SparseRow()
    row.set_prompt([0.5] * len(NUMBER_NAMES), [IDS[3]])
    row.set_candidate(2, [0.0] * len(LOAD_NAMES))
    text = booster(False).model_to_string()
    calls = [SingleRow(lgb.Booster(model_str=text), row) for _ in range(5)]
    gc.collect()
    assert len({call.predict()[0] for call in calls}) == 1
    del calls[:4]
    gc.collect()
    assert calls[0].predict()[0] == booster(False).predict(dense(row)[None])[0]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        SparseRow().set_prompt([0.0] * len(NUMBER_NAMES), range(COLUMNS))


def test_what_lightgbm_refuses_is_an_error() -> None:
    row = SparseRow()
    rows = np.zeros((60, COLUMNS + 1))
    rows[:, -2:] = np.random.default_rng(1).random((60, 2))
    wide = lgb.train({"verbosity": -1}, lgb.Dataset(rows, rows[:, -1]), num_boost_round=1)
    with pytest.raises(KnowledgeError, match="LightGBM"):
        SingleRow(wide, row)


def test_joined_boosters_predict_as_each_alone() -> None:
    draw = np.random.default_rng(2)
    rows = draw.normal(size=(200, COLUMNS)).astype(np.float32)
    rows[:, LAST_WORD:FIRST_LOAD] = 0.0
    params = {"verbosity": -1, "num_leaves": 7, "num_threads": 1, "min_data_in_leaf": 5}
    # Of different lengths; the last finds nothing to split.
    alone = [
        lgb.train(params, lgb.Dataset(rows, target), num_boost_round=rounds)
        for target, rounds in ((rows[:, 0], 3), (rows[:, 1] * rows[:, 2], 20), (np.ones(200), 1))
    ]
    row = SparseRow()
    text, places = joined([b.model_to_string() for b in (booster(False), *alone)])
    together = SingleRow(lgb.Booster(model_str=text), row)
    for one in rows[:50]:
        row.set_prompt(one[: len(NUMBER_NAMES)].tolist(), [IDS[1], IDS[5]])
        row.set_candidate(1, one[-len(LOAD_NAMES) :].tolist())
        expected = [b.predict(dense(row)[None])[0] for b in (booster(False), *alone)]
        sums = together.predict()
        assert [sum(sums[p]) for p in places] == pytest.approx(expected, abs=1e-12)
