"""Cold-start SLMs, simulated: requests until a joining SLM has its share of the traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from calm_serve.config import Fleet, Goals
from calm_serve.learning import ColdStartSLMs, fit_cold_start
from calm_serve.prediction import (
    Artifact,
    MetadataPrior,
    known_slms,
    load_artifact,
    own_head,
    with_cold_start,
)
from load_tests.paper.simulated.adaptation import (
    AFTER,
    BEFORE,
    FEEDBACK_RATIO,
    SHARE_RATIO,
)
from load_tests.paper.simulated.answers import Answers
from load_tests.paper.simulated.call import Row
from load_tests.paper.simulated.scenarios import Figures, capacity_rps
from load_tests.paper.simulated.world import World

NEW_SLMS = ("sql", "shell", "intent")
WINDOW = 200  # requests over which a share is taken


def new_slm(
    answers: Answers, seed: int, *, slm_id: str, feedback_ratio: float = FEEDBACK_RATIO
) -> Figures:
    """An SLM without any outcomes joins: requests until it has its share.

    Its share is the one that the shipped predictor, trained on its answers, gives it on the same
    requests. `bare` is without examples in the SLM's entry; `alone` is without
    `learning.ColdStartSLMs`, by rules and the metadata prior only.
    """
    name = f"new.{slm_id}"
    shipped_one = _artifact(answers.fleet)
    known = _arriving(answers, seed, slm_id, shipped_one, False, feedback_ratio).rows[BEFORE:]
    found: Figures = {f"{name}.share": _share(known, slm_id)}
    bare = replace(answers, fleet=_bare(answers.fleet, slm_id))
    for kind, learns in (("", True), ("bare.", True), ("alone.", False)):
        artifact, variant = without(shipped_one, slm_id), bare if kind == "bare." else answers
        after = _arriving(variant, seed, slm_id, artifact, learns, feedback_ratio).rows[BEFORE:]
        # Relative to the same requests, because the SLM's share differs between windows.
        ratios = [
            _share(after[i : i + WINDOW], slm_id) / _share(known[i : i + WINDOW], slm_id)
            for i in range(AFTER - WINDOW + 1)
        ]
        at = next((i for i, ratio in enumerate(ratios) if ratio >= SHARE_RATIO), AFTER)
        found |= {
            f"{name}.{kind}adoption_requests": float(at),
            f"{name}.{kind}adoption_answers": float(sum(r.slm == slm_id for r in after[:at])),
            f"{name}.{kind}first_share_ratio": ratios[0],
            f"{name}.{kind}share_ratio_after_150": ratios[150],
            f"{name}.{kind}last_share_ratio": ratios[-1],
            f"{name}.{kind}credit": float(np.mean([r.credit for r in after])),
            f"{name}.known_credit": float(np.mean([r.credit for r in known])),
        }
    return found


def _arriving(
    answers: Answers,
    seed: int,
    slm_id: str,
    artifact: Artifact,
    learns: bool,
    feedback_ratio: float,
) -> World:
    """BEFORE requests without the SLM, AFTER with it."""
    rng, fleet = Random(seed), answers.fleet
    world = World(
        answers,
        Goals(),
        seed=seed,
        predictor=with_cold_start(artifact, None, MetadataPrior()),
        fleet=fleet_without(fleet, slm_id),
        feedback_ratio=feedback_ratio,
    )
    rate, now = 0.3 * capacity_rps(answers, answers.largest), 0.0
    arrived = []
    for _ in range(BEFORE + AFTER):
        now += rng.expovariate(rate)
        arrived.append((now, rng.randrange(len(answers))))
    world.serve(arrived[:BEFORE])
    world.set_fleet(fleet)
    cold_start = ColdStartSLMs()
    if learns:
        cold_start.follow(fleet, known_slms(artifact))
    for cut in range(BEFORE, BEFORE + AFTER, 5):
        # As in the knowledge actor: outcomes come in small batches, a fit is published at once.
        if (job := cold_start.job()) is not None:
            fitted = fit_cold_start(job, world.clock.now_s)
            world.selector.predictor = with_cold_start(artifact, fitted, MetadataPrior())
        world.outcomes = []
        world.serve(arrived[cut : cut + 5])
        cold_start.observe(world.outcomes)
    world.finish()
    return world


def without(artifact: Artifact, slm_id: str) -> Artifact:
    """The predictor as if it had not been trained on the SLM."""
    gone = {own_head(head, slm_id) for head in ("success", "output_tokens")}
    boosters = {k: v for k, v in artifact.boosters.items() if k not in gone}
    ids = tuple(s for s in artifact.slm_ids if s != slm_id)
    if len(ids) < len(artifact.slm_ids) and "ttft_residual" in boosters:
        raise ValueError("the TTFT residual has the SLMs' indices as a feature")
    return replace(artifact, slm_ids=ids, boosters=boosters)


def fleet_without(fleet: Fleet, slm_id: str) -> Fleet:
    """The fleet without the SLM and the rules that name it."""
    return fleet.model_copy(
        update={
            "slms": tuple(s for s in fleet.slms if s.id != slm_id),
            "rules": tuple(r for r in fleet.rules if slm_id not in r.slms),
        }
    )


def _bare(fleet: Fleet, slm_id: str) -> Fleet:
    slms = [s.model_copy(update={"examples": ()}) if s.id == slm_id else s for s in fleet.slms]
    return fleet.model_copy(update={"slms": tuple(slms)})


def _artifact(fleet: Fleet) -> Artifact:
    return load_artifact(Path(fleet.predictor) / "predictor.bin")


def _share(rows: Sequence[Row], slm_id: str) -> float:
    return float(np.mean([r.chosen == slm_id for r in rows]))
