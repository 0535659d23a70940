"""Prompts that look alike are one group, whoever asks and however the group was stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from calm_serve.prediction import COLUMNS, FIRST_BUCKET, SparseRow, prompt_rows
from calm_serve.prediction.pseudo_tasks import GROUPS, PseudoTasks, find_pseudo_tasks
from calm_serve.requests import NUMBER_NAMES
from calm_serve.testing import make_outcome
from calm_serve.types import FIRST_WORD, Outcome

KINDS, OWN_WORDS, COMMON_WORDS = 4, 40, 30


def group_of(numbers: Sequence[float], buckets: Sequence[int]) -> int:
    row = SparseRow()
    row.set_prompt(numbers, buckets)
    return found().of_prompt(row)


def prompt_of(kind: int, rng: Random) -> Outcome:
    """A prompt of eight words of its kind and four that all kinds have."""
    first = FIRST_WORD + COMMON_WORDS + kind * OWN_WORDS
    own = rng.sample(range(first, first + OWN_WORDS), 8)
    common = rng.sample(range(FIRST_WORD, FIRST_WORD + COMMON_WORDS), 4)
    numbers = tuple(rng.gauss(kind, 1.0) for _ in NUMBER_NAMES)
    return make_outcome("o", numbers=numbers, buckets=tuple(sorted(own + common)))


@cache
def prompts() -> tuple[Outcome, ...]:
    rng = Random(5)
    return tuple(prompt_of(i % KINDS, rng) for i in range(400))


@cache
def found(seed: int = 1) -> PseudoTasks:
    return find_pseudo_tasks(prompt_rows(prompts()), seed)


def test_a_group_has_prompts_of_one_kind() -> None:
    groups = found().of_rows(prompt_rows(prompts()))
    assert len(found()) == GROUPS
    for group in set(groups.tolist()):
        kinds = np.bincount(np.flatnonzero(groups == group) % KINDS, minlength=KINDS)
        assert kinds.max() >= 0.95 * kinds.sum()


def test_one_prompt_is_assigned_as_many_are() -> None:
    rng = Random(6)
    new = [prompt_of(rng.randrange(KINDS), rng) for _ in range(200)]
    alone = [group_of(o.features.numbers, o.features.buckets) for o in new]
    assert found().of_rows(prompt_rows(new)).tolist() == alone


def test_a_prompt_without_words_has_a_group() -> None:
    assert 0 <= group_of((0.0,) * len(NUMBER_NAMES), ()) < GROUPS


def test_equal_prompts_and_seed_give_equal_groups() -> None:
    assert find_pseudo_tasks(prompt_rows(prompts()), 1) == found()
    assert found(2) != found()


def test_groups_survive_the_wire() -> None:
    again = PseudoTasks.from_plain(json.loads(json.dumps(found().to_plain())))
    rows = prompt_rows(prompts())
    assert again == found()
    assert np.array_equal(again.of_rows(rows), found().of_rows(rows))


@pytest.mark.parametrize(
    "changed",
    [{"idf": "AAAA"}, {"levels": "?"}, {"level": [1.0]}, {"mean": [0.0]}, {"scale": ["x"]}],
)
def test_malformed_groups_are_an_error(changed: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        PseudoTasks.from_plain({**found().to_plain(), **changed})


def test_few_prompts_or_equal_ones_make_fewer_groups() -> None:
    assert len(find_pseudo_tasks(prompt_rows(prompts()[:45]), 1)) == 2
    assert len(find_pseudo_tasks(prompt_rows(prompts()[:1] * 400), 1)) == 1
    with pytest.raises(ValueError, match="no prompts"):
        find_pseudo_tasks(sparse.csr_matrix((0, COLUMNS), dtype=np.float32), 1)


def test_one_odd_number_does_not_decide_the_group() -> None:
    one = prompts()[0]
    odd = (*one.features.numbers[:-1], 1e9)
    usual = group_of(one.features.numbers, one.features.buckets)
    assert group_of(odd, one.features.buckets) == usual
    assert len(odd) == FIRST_BUCKET
