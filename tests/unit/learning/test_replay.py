"""`calm replay`: logged choices made again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from calm_serve.config import Goals
from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.outcome_reader import read_outcomes
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.learning.replay import Replay, ReplaySettings
from calm_serve.learning.training import train
from calm_serve.prediction.base import MetadataPrior
from calm_serve.prediction.lightgbm import LightGBMPredictor
from calm_serve.routing.selector import config_version
from calm_serve.testing import change_outcome
from calm_serve.types import Outcome, Weights
from tests.knowledge_data import CODER, TALKER, make_outcome, make_world
from tests.logged_decisions import serve

GOALS = Goals(exploration_ratio=0.3)
LEARNED = LightGBMPredictor(
    train(make_world(600), (CODER, TALKER), seed=0, holdout_ratio=0.25, clock=lambda: 0.0).artifact,
    MetadataPrior(),
)


def replayed(
    outcomes: list[Outcome], goals: Goals, predictor: LightGBMPredictor | None = None
) -> Replay:
    replay = Replay(ReplaySettings(goals, config_version(goals), predictor))
    for outcome in outcomes:
        replay.add(outcome)
    return replay


@pytest.mark.parametrize("predictor", [None, LEARNED])
def test_the_same_goals_and_predictor_reproduce_every_choice(
    predictor: LightGBMPredictor | None,
) -> None:
    found = replayed(serve(200, GOALS, LEARNED), GOALS, predictor)
    assert (found.comparable, found.reproduced, found.differing) == (200, 200, [])
    explored = sum(o.decision.reason == "exploration" for o in serve(200, GOALS, LEARNED))
    assert explored > 20
    # What the draw chose is reproduced; the evaluated policy does not explore.
    assert found.report()["changed"] == explored


def test_weights_that_a_controller_had_moved_are_taken_from_the_log() -> None:
    outcomes = [
        change_outcome(o, terms=replace(o.decision.terms, weights=Weights(9.0, 0.0, 0.0)))
        for o in serve(50, Goals(exploration_ratio=0.0), LEARNED)
    ]
    found = replayed(outcomes, Goals(exploration_ratio=0.0))
    assert found.comparable == 50
    assert 0 < found.reproduced < 50
    assert len(found.differing) == min(50 - found.reproduced, 10)


def test_other_goals_and_predictors_are_not_expected_to_reproduce() -> None:
    outcomes = serve(30, GOALS, LEARNED)
    other = replayed(outcomes, Goals(latency_weight_per_s=1.0))
    assert (other.comparable, dict(other.not_comparable)) == (0, {"decided under other goals": 30})
    prior = replayed(serve(30, GOALS), GOALS, LEARNED)
    assert dict(prior.not_comparable) == {"decided by another predictor": 30}


def test_decisions_that_cannot_be_replayed_are_counted_by_reason() -> None:
    pinned, ruled, old = (
        make_outcome(str(i), path=path) for i, path in enumerate(("pinned", "rule", "scored"))
    )
    found = replayed([pinned, ruled, ruled, old], GOALS)
    assert found.report()["skipped"] == {
        "chosen by the client": 1,
        "chosen by a rule": 2,
        "logged without its candidates": 1,
    }


def test_a_shipped_predictor_is_recognised_by_its_version() -> None:
    outcomes = serve(20, GOALS, LEARNED)
    shipped = [
        change_outcome(o, versions=replace(o.decision.versions, predictor=replace(p, shipped=True)))
        for o in outcomes
        if (p := o.decision.versions.predictor)
    ]
    assert replayed(shipped, GOALS, LEARNED).reproduced == 20


def test_the_estimates_show_that_a_predictor_chooses_better() -> None:
    outcomes = serve(600, GOALS)  # by the prior: the same SLM for every prompt
    report = replayed(outcomes, GOALS, LEARNED).report()
    assert 200 < report["changed"] < 400
    quality = report["estimates"]["quality"]
    truth = 0.95
    low, high = quality["doubly_robust"]["ci95"]
    assert low < truth < high
    assert quality["difference"]["ci95"][0] > 0.2
    assert quality["logged"] < 0.7
    moved = {(m["from"], m["to"]): m["decisions"] for m in report["moved"]}
    assert sum(moved.values()) == report["changed"]


def test_a_high_latency_weight_chooses_what_is_predicted_to_be_faster() -> None:
    outcomes = serve(400, GOALS, LEARNED)
    report = replayed(outcomes, Goals(exploration_ratio=0.0, latency_weight_per_s=50.0)).report()
    faster = report["estimates"]["e2e_s"]["difference"]
    assert faster["ci95"][1] < 0.0
    assert report["estimates"]["quality"]["difference"]["ci95"][1] < 0.0


def test_targets_move_the_weights_in_a_replay_as_they_do_in_a_router() -> None:
    outcomes = serve(400, GOALS, LEARNED)
    spent = sum(o.engine.energy_j or 0.0 for o in outcomes) / len(outcomes)
    goals = Goals(exploration_ratio=0.0, energy_per_request_j=0.7 * spent)
    report = replayed(outcomes, goals).report()
    estimate = report["estimates"]["energy_j"]
    assert estimate["logged"] == pytest.approx(spent)
    # The first rows have the stated weights, until there is something to steer by.
    assert estimate["doubly_robust"]["value"] < 0.85 * spent
    assert estimate["difference"]["ci95"][1] < 0.0
    assert report["weights"]["energy_per_j"] > goals.energy_weight_per_j
    assert replayed(outcomes, Goals()).report()["weights"] is None


def test_what_a_rule_chose_counts_against_a_target_too() -> None:
    outcomes = serve(200, GOALS, LEARNED)
    spent = sum(o.engine.energy_j or 0.0 for o in outcomes) / len(outcomes)
    goals = Goals(exploration_ratio=0.0, energy_per_request_j=1.05 * spent)
    ruled = [make_outcome(f"rule-{i}", path="rule", energy_j=0.2 * spent) for i in range(200)]
    mixed = [o for pair in zip(outcomes, ruled, strict=True) for o in pair]
    alone, cheaper = (replayed(rows, goals).report()["weights"] for rows in (outcomes, mixed))
    assert cheaper["energy_per_j"] <= alone["energy_per_j"]
    dear = [change_outcome(o, energy_j=2.0 * spent) for o in ruled]
    mixed = [o for pair in zip(outcomes, dear, strict=True) for o in pair]
    assert replayed(mixed, goals).report()["weights"]["energy_per_j"] > alone["energy_per_j"]


def test_a_log_may_be_a_store_or_json_lines(tmp_path: Path) -> None:
    outcomes = serve(30, GOALS, LEARNED)
    lines = tmp_path / "log.jsonl"
    lines.write_text("".join(json.dumps(asdict(o)) + "\n" for o in outcomes))
    store = OutcomeStore(f"sqlite:///{tmp_path / 'outcomes.sqlite'}")
    store.append(outcomes)
    store.close()
    found = [list(read_outcomes(str(tmp_path / n))) for n in ("log.jsonl", "outcomes.sqlite")]
    assert found == [outcomes, outcomes]
    assert list(read_outcomes(f"sqlite:///{tmp_path / 'outcomes.sqlite'}")) == outcomes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.sqlite", None, "not found"),
        ("log.jsonl", "{}\n", r"log\.jsonl:1"),
        ("log.jsonl", "\n[1\n", r"log\.jsonl:2"),
        ("notes.sqlite", "nothing like a database, but long enough to look at", "database"),
    ],
)
def test_a_file_that_is_no_log_is_an_error(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(KnowledgeError, match=message):
        list(read_outcomes(str(tmp_path / name)))


def test_an_empty_log_has_no_estimates() -> None:
    report = replayed([], GOALS).report()
    assert set(report["estimates"].values()) == {None}


def test_requests_for_which_no_slm_could_be_chosen_are_skipped() -> None:
    found = replayed([Outcome("refused", "", status="rejected", failure="no_slm")], GOALS)
    assert found.skipped == {"no SLM could be chosen": 1}
