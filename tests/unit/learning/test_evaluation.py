"""The promotion test: a challenger is published only when it is surely better."""

from __future__ import annotations

import numpy as np
import pytest

from calm_serve.config import Goals
from calm_serve.learning import evaluation
from calm_serve.learning.evaluation import (
    MIN_EXPLORED,
    MIN_HOLDOUT,
    ValueGain,
    Verdict,
    VerdictReason,
    compare,
    promotion_test,
    value_gain,
)
from calm_serve.learning.off_policy import Estimate
from calm_serve.learning.training import Training, train
from calm_serve.testing import change_outcome
from calm_serve.types import Outcome, QualitySignal
from tests.knowledge_data import CODER, TALKER, make_world
from tests.logged_decisions import serve


def trained(truth: bool = True, count: int = 400) -> Training:
    return train(
        make_world(count, truth=truth),
        (CODER, TALKER),
        seed=0,
        holdout_ratio=0.25,
        clock=lambda: 0.0,
    )


def verdict(training: Training, champion: Training | None = None, seed: int = 0) -> Verdict:
    return promotion_test(
        training.holdout,
        champion.artifact if champion else None,
        training.artifact,
        base_rate=training.base_rate,
        seed=seed,
    )


def test_the_first_challenger_is_published_when_it_beats_the_base_rate() -> None:
    found = verdict(trained())
    assert found.publish
    assert found.reason is VerdictReason.BETTER
    assert found.champion_loss is not None
    assert found.challenger_loss is not None
    assert found.difference_ci95 is not None
    low, high = found.difference_ci95
    assert 0 < low < found.champion_loss - found.challenger_loss < high


def test_a_challenger_that_learned_nothing_is_not_published() -> None:
    found = verdict(trained(truth=False))
    assert not found.publish
    assert found.reason is VerdictReason.NOT_BETTER


def test_a_challenger_equal_to_the_champion_is_not_published() -> None:
    training = trained()
    found = verdict(training, training)
    assert not found.publish
    assert found.difference_ci95 == (0.0, 0.0)


def test_a_bad_champion_is_replaced_and_a_good_one_stays() -> None:
    good, bad = trained(), trained(truth=False)
    assert verdict(good, bad).publish
    swapped = promotion_test(
        good.holdout, good.artifact, bad.artifact, base_rate=good.base_rate, seed=0
    )
    assert not swapped.publish


def test_the_same_mean_gain_is_published_when_sure_and_not_when_noisy() -> None:
    gain = np.tile([0.52, -0.48], 20)
    champion, weights = np.full(40, 0.7), np.ones(40)
    assert not compare(champion, champion - gain, weights, seed=0).publish
    assert compare(champion, champion - gain.mean(), weights, seed=0).publish


@pytest.mark.parametrize(("count", "publish"), [(MIN_HOLDOUT - 1, False), (MIN_HOLDOUT, True)])
def test_a_handful_of_outcomes_decides_nothing(count: int, publish: bool) -> None:
    found = compare(np.full(count, 0.9), np.full(count, 0.1), np.ones(count), seed=0)
    assert found.publish is publish
    assert (found.reason is VerdictReason.TOO_FEW_HELD_OUT) is not publish


def test_weak_labels_weigh_less() -> None:
    champion = np.array([1.0] * 50 + [0.0] * 50)
    weights = np.array([1.0] * 50 + [0.01] * 50)
    assert compare(champion, champion[::-1].copy(), weights, seed=0).publish
    assert not compare(champion, champion[::-1].copy(), weights[::-1].copy(), seed=0).publish


def test_the_interval_is_in_nats_whatever_the_weights() -> None:
    champion, challenger = np.linspace(0.6, 0.8, 50), np.linspace(0.5, 0.6, 50)
    found = compare(champion, challenger, np.full(50, 0.3), seed=0)
    assert found.difference_ci95 is not None
    low, high = found.difference_ci95
    assert low < 0.15 < high
    assert high - low < 0.05


def test_equal_input_and_seed_give_an_equal_verdict() -> None:
    training = trained(count=120)
    assert verdict(training, seed=4) == verdict(training, seed=4)
    assert verdict(training, seed=4) != verdict(training, seed=5)


def logged(count: int, *, explored: bool, seed: int = 0) -> list[Outcome]:
    """Choices of the prior, with or without exploration."""
    return serve(count, Goals(exploration_ratio=0.3 if explored else 0.0), seed=seed)


def test_a_challenger_that_also_chooses_better_is_published_with_both_numbers() -> None:
    challenger = trained()
    found = promotion_test(
        logged(300, explored=True), None, challenger.artifact, base_rate=0.5, seed=0
    )
    assert found.publish
    assert found.explored >= MIN_EXPLORED
    assert found.value_rows == 300
    assert found.value_difference_ci95 is not None
    assert found.value_difference_ci95[0] > 0.0


def predicts_well_and_chooses_badly() -> Training:
    """Better at predicting the SLM chosen now, wrong about the one it would choose."""
    rows = [o for o in make_world(800) if o.slm_id == CODER or o.outcome_id[-1] in "012"]
    lies = [
        change_outcome(o, signals=(QualitySignal("feedback", 1.0, o.at),))
        if o.slm_id == TALKER
        else o
        for o in rows
    ]
    return train(lies, (CODER, TALKER), seed=0, holdout_ratio=0.25, clock=lambda: 0.0)


def test_a_challenger_that_predicts_better_and_may_choose_worse_is_not_published() -> None:
    challenger = predicts_well_and_chooses_badly()

    def poor_talker(code: bool, slm_id: str) -> float:
        return 0.75 if slm_id == CODER and not code else 0.05

    outcomes = serve(400, Goals(exploration_ratio=0.15), truth=poor_talker)
    gain = value_gain(outcomes, None, challenger.artifact, seed=0)
    assert gain is not None
    assert gain.explored >= MIN_EXPLORED
    assert gain.estimate.ci95[1] < 0.0


def test_without_explored_rows_the_log_loss_decides_alone() -> None:
    found = promotion_test(
        logged(300, explored=False), None, trained().artifact, base_rate=0.5, seed=0
    )
    assert found.explored == 0
    assert found.reason is not VerdictReason.VALUE_MAY_FALL


@pytest.mark.parametrize(
    ("low", "explored", "publish", "reason"),
    [
        (-0.01, MIN_EXPLORED, True, VerdictReason.BETTER),
        (-0.03, MIN_EXPLORED, False, VerdictReason.VALUE_MAY_FALL),
        (-0.03, MIN_EXPLORED - 1, True, VerdictReason.BETTER),
    ],
)
def test_the_lower_bound_of_the_value_decides_once_enough_was_explored(
    monkeypatch: pytest.MonkeyPatch,
    low: float,
    explored: int,
    publish: bool,
    reason: VerdictReason,
) -> None:
    training = trained()
    gain = ValueGain(Estimate(0.0, (low, 0.1)), 100, explored)
    monkeypatch.setattr(evaluation, "value_gain", lambda *_, **__: gain)
    found = promotion_test(
        training.holdout, None, training.artifact, base_rate=training.base_rate, seed=0
    )
    assert (found.publish, found.reason) == (publish, reason)
    assert found.value_difference_ci95 == (low, 0.1)


def noise_beside_means(count: int) -> tuple[list[Outcome], dict[str, float]]:
    """Outcomes whose labels depend on the SLM alone, and the SLMs' mean labels."""
    draw, found = np.random.default_rng(8), []
    ratio = {CODER: 0.9, TALKER: 0.2}
    for o in make_world(count):
        label = float(draw.random() < ratio[o.slm_id])
        found.append(change_outcome(o, signals=(QualitySignal("feedback", label, o.at),)))
    return found, ratio


def test_a_challenger_that_only_knows_the_means_is_no_better_than_they_are() -> None:
    rows, means = noise_beside_means(800)
    training = train(rows, (CODER, TALKER), seed=0, holdout_ratio=0.25, clock=lambda: 0.0)
    args = (training.holdout, None, training.artifact)
    assert promotion_test(*args, base_rate=training.base_rate, seed=0).publish
    found = promotion_test(*args, base_rate=training.base_rate, seed=0, means=means)
    assert (found.publish, found.reason) == (False, VerdictReason.MEANS_AS_GOOD)
    assert found.means_difference_ci95 is not None
    assert found.means_difference_ci95[0] <= 0.0


def test_a_challenger_that_knows_more_than_the_means_is_published() -> None:
    training = trained()
    found = promotion_test(
        training.holdout,
        None,
        training.artifact,
        base_rate=training.base_rate,
        seed=0,
        means=training.mean_labels,
    )
    assert (found.publish, found.reason) == (True, VerdictReason.BETTER)
    assert found.means_difference_ci95 is not None
    assert found.means_difference_ci95[0] > 0.0


@pytest.mark.parametrize(
    ("over_means", "explored", "publish"),
    [(-0.01, MIN_EXPLORED, False), (0.01, MIN_EXPLORED, True), (-0.01, MIN_EXPLORED - 1, True)],
)
def test_choices_of_a_lower_value_than_the_best_mean_are_not_published(
    monkeypatch: pytest.MonkeyPatch, over_means: float, explored: int, publish: bool
) -> None:
    training = trained()
    gain = ValueGain(Estimate(0.0, (0.0, 0.1)), 100, explored, over_means)
    monkeypatch.setattr(evaluation, "value_gain", lambda *_, **__: gain)
    found = promotion_test(
        training.holdout,
        None,
        training.artifact,
        base_rate=training.base_rate,
        seed=0,
        means=training.mean_labels,
    )
    assert found.publish is publish
    assert found.means_value_difference == over_means
