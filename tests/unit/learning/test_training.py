"""Training on outcomes of a world whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calm_serve.errors import KnowledgeError
from calm_serve.learning import metrics
from calm_serve.learning.training import (
    MIN_LABELLED,
    TRAINED_UNTIL,
    Training,
    refitted,
    success_probabilities,
    train,
    without_prompts,
)
from calm_serve.prediction.artifact import OUTPUT_TOKENS, SUCCESS, own_head
from calm_serve.prediction.novelty import NoveltyDetector
from calm_serve.testing import change_outcome
from calm_serve.types import Outcome, QualitySignal
from tests.knowledge_data import CODER, TALKER, make_outcome, make_world

SLMS = (CODER, TALKER)


def run(outcomes: list[Outcome], ratio: float = 0.25, seed: int = 3) -> Training:
    return train(outcomes, SLMS, seed=seed, holdout_ratio=ratio, clock=lambda: 77.0)


def test_it_learns_content_and_measures_itself() -> None:
    metrics = run(make_world(500)).metrics
    assert metrics["log_loss"] < 0.6 * metrics["base_rate_log_loss"]
    assert metrics["auc"] > 0.9
    assert metrics["calibration_error"] < 0.1
    assert metrics["output_tokens_mae"] < 0.1 * metrics["mean_output_tokens_mae"]
    assert metrics["ttft_mae_s"] < 0.2 * metrics["analytic_ttft_mae_s"]


def test_random_labels_are_not_learned() -> None:
    metrics = run(make_world(500, truth=False)).metrics
    assert metrics["log_loss"] > 0.95 * metrics["base_rate_log_loss"]


def test_equal_input_seed_and_clock_give_equal_bytes() -> None:
    world = make_world(120)
    assert run(world).artifact.to_bytes() == run(world[::-1]).artifact.to_bytes()


def test_the_newest_share_is_held_out() -> None:
    training = run(make_world(100)[::-1], ratio=0.3)
    assert [o.outcome_id for o in training.holdout] == [f"o{i}" for i in range(70, 100)]
    assert training.artifact.trained_on == 70


def test_the_holdout_does_not_reach_the_model() -> None:
    world = make_world(200)
    lied = [
        change_outcome(o, signals=(QualitySignal("feedback", 0.0),), output_tokens=999, ttft_s=9.0)
        if i >= 150
        else o
        for i, o in enumerate(world)
    ]
    assert run(lied).artifact.boosters == run(world).artifact.boosters


def test_a_refit_learns_from_the_held_out_labels_too() -> None:
    world = make_world(200)
    training = run(world, ratio=0.4)
    final = refitted(training, world, seed=3, clock=lambda: 78.0)
    assert (training.artifact.trained_on, final.trained_on) == (120, 200)
    assert final.metrics[TRAINED_UNTIL] == max(o.at for o in world)
    assert final.metrics["log_loss"] == training.metrics["log_loss"]
    whole = run(world, ratio=1e-9).artifact
    assert (final.starts, final.boosters) != (training.artifact.starts, training.artifact.boosters)
    assert final.version not in (training.artifact.version, whole.version)


def test_a_challenger_learns_from_half_of_what_the_champion_has_not_seen() -> None:
    world = sorted(make_world(100), key=lambda o: o.at)

    def held_out(seen_until: float) -> int:
        training = train(
            world, SLMS, seed=3, holdout_ratio=0.5, clock=lambda: 0.0, seen_until=seen_until
        )
        return len(training.holdout)

    assert held_out(world[59].at) == 20
    assert held_out(world[9].at) == 45
    assert held_out(world[0].at - 1.0) == 50
    assert held_out(world[-1].at) == 1  # too few to compare anything


def test_without_prompts_every_answer_of_an_slm_is_expected_alike() -> None:
    training = run(make_world(200))
    means = without_prompts(training)
    found = success_probabilities(means, training.holdout, 0.5)
    for outcome, probability in zip(training.holdout, found, strict=True):
        expected = training.mean_labels[outcome.slm_id]
        assert probability == pytest.approx(expected, abs=1e-3)
    assert means.metrics["log_loss"] > training.metrics["log_loss"]


def test_buckets_of_an_earlier_layout_are_no_features() -> None:
    world = make_world(100)
    earlier = [change_outcome(o, outcome_id=f"e{i}", buckets=(3, 7)) for i, o in enumerate(world)]
    assert run(world + earlier).artifact == run(world).artifact


def test_ttft_after_a_failover_is_not_learned() -> None:
    world = make_world(200)
    late = [
        change_outcome(o, retries=1, ttft_s=30.0 + (o.timing.ttft_s or 0.0)) if i % 4 == 0 else o
        for i, o in enumerate(world)
    ]
    metrics = run(late).metrics
    assert metrics["ttft_mae_s"] < 0.2 * metrics["analytic_ttft_mae_s"]


def test_an_artifact_records_when_it_was_made() -> None:
    assert run(make_world(60)).artifact.created_at == 77.0


def test_one_label_only_leaves_success_to_the_prior() -> None:
    world = [change_outcome(o, signals=(QualitySignal("feedback", 1.0),)) for o in make_world(80)]
    training = run(world)
    assert set(training.artifact.boosters) == {
        own_head(OUTPUT_TOKENS, CODER),
        own_head(OUTPUT_TOKENS, TALKER),
        "ttft_residual",
    }
    assert training.metrics["auc"] is None
    assert math.isfinite(training.metrics["log_loss"])


def test_length_and_latency_are_learned_from_unlabelled_outcomes_too() -> None:
    world = make_world(400)
    mute = [change_outcome(o, signals=()) if i % 8 else o for i, o in enumerate(world)]
    metrics = run(mute).metrics
    assert metrics["fit_outcomes"] > 250
    assert metrics["output_tokens_mae"] < 0.1 * metrics["mean_output_tokens_mae"]


def test_latency_is_not_learned_from_cold_starts_and_failures() -> None:
    world = [change_outcome(o, cold=True) if i % 2 else o for i, o in enumerate(make_world(120))]
    assert "ttft_residual" in run(world).artifact.boosters
    none = [change_outcome(o, cold=True) for o in make_world(120)]
    assert "ttft_residual" not in run(none).artifact.boosters
    failed = [change_outcome(o, status="error") for o in make_world(120)]
    assert set(run(failed).artifact.boosters) == {
        own_head(SUCCESS, CODER),
        own_head(SUCCESS, TALKER),
    }


def test_an_slm_with_too_few_outcomes_stays_with_its_prior() -> None:
    world = [o for o in make_world(120) if o.slm_id == CODER]
    rare = [change_outcome(o, outcome_id=f"t{i}", slm_id=TALKER) for i, o in enumerate(world[:3])]
    assert run(world + rare).artifact.slm_ids == (CODER,)


def test_outcomes_of_other_slms_and_older_layouts_are_left_out() -> None:
    world = make_world(100)
    gone = [change_outcome(o, outcome_id=f"g{i}", slm_id="gone") for i, o in enumerate(world)]
    old = [change_outcome(o, outcome_id=f"x{i}", numbers=(1.0,)) for i, o in enumerate(world)]
    assert run(world + gone + old).artifact == run(world).artifact


def test_requests_that_were_turned_away_are_not_learned_from_even_if_a_client_rates_them() -> None:
    world = make_world(100)
    away = [change_outcome(o, outcome_id=f"r{i}", status="rejected") for i, o in enumerate(world)]
    none = [change_outcome(o, outcome_id=f"n{i}", slm_id="") for i, o in enumerate(away)]
    assert run(world + away + none).artifact == run(world).artifact


def test_too_few_labels_are_an_error_that_counts_them() -> None:
    with pytest.raises(KnowledgeError, match=f"{MIN_LABELLED - 1} labelled"):
        run(make_world(MIN_LABELLED - 1))


def test_no_slm_with_enough_labels_is_an_error() -> None:
    slms = [f"s{i}" for i in range(30)]
    world = [
        change_outcome(make_outcome(s), slm_id=s, signals=make_world(1)[0].signals) for s in slms
    ]
    with pytest.raises(KnowledgeError, match="no SLM"):
        train(world, slms, seed=0, holdout_ratio=0.25, clock=lambda: 0.0)


ONES = np.ones(4)


def test_auc_counts_ordered_pairs_and_halves_ties() -> None:
    labels = np.array([0.0, 0.0, 1.0, 1.0])
    assert metrics.auc(labels, np.array([0.1, 0.2, 0.3, 0.4]), ONES) == 1.0
    assert metrics.auc(labels, np.array([0.4, 0.3, 0.2, 0.1]), ONES) == 0.0
    assert metrics.auc(labels, np.full(4, 0.5), ONES) == 0.5
    assert metrics.auc(labels, np.array([0.1, 0.3, 0.3, 0.4]), ONES) == 0.875


def test_calibration_error_is_the_gap_between_prediction_and_truth() -> None:
    labels = np.array([1.0, 1.0, 0.0, 0.0])
    assert metrics.calibration_error(labels, np.full(4, 0.5), ONES) == 0.0
    assert metrics.calibration_error(labels, np.full(4, 0.9), ONES) == pytest.approx(0.4)


def test_a_confident_mistake_has_a_bounded_loss() -> None:
    loss = metrics.log_loss(np.array([1.0]), np.array([0.0]), np.array([1.0]))
    assert loss == pytest.approx(-math.log(1e-3))


def with_bits(world: list[Outcome], **changes: object) -> list[Outcome]:
    """The same outcomes with a prompt of its own each."""
    return [change_outcome(o, bits=(i, i + 1, i + 2), **changes) for i, o in enumerate(world)]


def test_the_prompts_of_labelled_outcomes_are_familiar_afterwards() -> None:
    seen = run(with_bits(make_world(400))).artifact.seen
    assert seen is not None
    assert seen.prompts == 300  # a quarter is held out
    novelty = NoveltyDetector(seen).novelty
    known, new = novelty((100, 101, 102)), novelty((1000, 1001, 1002))
    assert known is not None and new is not None
    assert known.ratio == 0.0 < new.ratio


def test_prompts_without_a_label_or_that_a_generalist_got_stay_unfamiliar() -> None:
    world = make_world(400)
    mute = [change_outcome(o, signals=()) if i % 2 else o for i, o in enumerate(with_bits(world))]
    blind = [
        change_outcome(o, path="unfamiliar") if i % 2 else o for i, o in enumerate(with_bits(world))
    ]
    for found in (run(mute).artifact.seen, run(blind).artifact.seen):
        assert found is not None
        assert 140 <= found.prompts <= 200


def test_outcomes_without_bits_give_no_bitmap() -> None:
    assert run(make_world(400)).artifact.seen is None
