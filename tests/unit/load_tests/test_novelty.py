"""The novelty benchmark's prompts and figures; the figures' bounds are those that are stated."""

from __future__ import annotations

import numpy as np

from calm_serve.config import parse_fleet
from calm_serve.prediction import load_artifact
from deployments.reference_fleet.grading.rows import FILES, load
from deployments.reference_fleet.paths import PREDICTOR
from load_tests.common.served import FLEETS, fleet_file
from load_tests.routing.novelty import LETTERS, auroc, choices, figures, foreign_prompts


def test_the_area_is_the_chance_that_a_foreign_prompt_is_above_a_familiar_one() -> None:
    low, high = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5])
    assert (auroc(low, high), auroc(high, low), auroc(low, low)) == (1.0, 0.0, 0.5)


def test_no_foreign_prompt_is_among_the_fleets_own_rows() -> None:
    own = {row.prompt for name in FILES for row in load(name)}
    foreign = foreign_prompts()
    assert len(foreign) == 4 and min(map(len, foreign.values())) >= 60
    assert not own & {prompt for prompts in foreign.values() for prompt in prompts}


def test_the_shipped_predictor_tells_foreign_prompts_from_familiar_ones() -> None:
    found = figures()
    assert found["novelty_auroc"] >= 0.96
    assert found["novelty_worst_auroc"] >= 0.88
    assert found["novelty_false_alarm_ratio"] <= 0.06


def test_random_letters_go_to_the_generalist_of_the_reference_fleet() -> None:
    fleet = parse_fleet(fleet_file("reference"), FLEETS)
    chosen = choices(fleet, load_artifact(PREDICTOR), foreign_prompts()[LETTERS][:40])
    assert chosen.count("general") >= 36
