"""Novelty: does the shipped predictor notice prompts that are unlike all that it was trained on?

The standard workload is familiar: of the kinds that the predictor was fitted on, but other prompts.
The foreign prompts (`foreign/`, and random letters) are of other kinds. Nothing is served.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calm_serve.config import Fleet, Goals, parse_fleet
from calm_serve.prediction import Artifact, LightGBMPredictor, MetadataPrior, load_artifact
from calm_serve.requests import Overrides, parse_chat, text_bits, text_hashes, token_bits
from calm_serve.routing import ModelSelector
from deployments.reference_fleet.paths import PREDICTOR
from load_tests.common.served import FLEETS, fleet_file
from load_tests.common.workloads import standard
from load_tests.fleet.fit_predictor import GENERALISTS_TASKS

FOREIGN = Path(__file__).parent / "foreign"
SETS = ("mbpp", "gsm8k", "languages")
LETTERS = "letters"  # words of random letters, which no file holds
LETTER_PROMPTS, LETTER_WORDS, LETTER_CHARS = 200, (3, 20), (2, 9)
SEED = 9
GENERALIST_ABOVE = 0.5  # generality
TIMED_CHARS = 2000  # of the prompt whose cost is measured
TIMED_RUNS, TIMED_ROUNDS = 200, 30

Ratios = NDArray[np.float64]


def foreign_prompts() -> dict[str, list[str]]:
    """Prompts of kinds that the fleet was not trained for, by set."""
    found = {
        name: [json.loads(line) for line in (FOREIGN / f"{name}.jsonl").open(encoding="utf-8")]
        for name in SETS
    }
    rng = Random(SEED)
    words = [rng.randint(*LETTER_WORDS) for _ in range(LETTER_PROMPTS)]
    found[LETTERS] = [" ".join(_letters(rng) for _ in range(count)) for count in words]
    return found


def familiar_prompts() -> list[str]:
    """The last user messages of the standard workload, without those of the generalist's tasks."""
    known = (one for one in standard() if one.row.task not in GENERALISTS_TASKS)
    return [one.messages[-1]["content"] for one in known]


def figures(artifact: Artifact | None = None) -> dict[str, Any]:
    """Figures of an artifact, by default the shipped one; `{}` when it has no bitmap.

    AUROC: probability that a foreign prompt has a higher novelty than a familiar one.
    """
    predictor = LightGBMPredictor(artifact or load_artifact(PREDICTOR), MetadataPrior())
    familiar, threshold = _ratios(predictor, familiar_prompts())
    if threshold is None:
        return {}
    found: dict[str, Any] = {}
    areas: dict[str, float] = {}
    for name, prompts in foreign_prompts().items():
        ratios, _ = _ratios(predictor, prompts)
        areas[name] = auroc(familiar, ratios)
        found[f"novelty_auroc.{name}"] = round(areas[name], 4)
        found[f"novelty_detected_ratio.{name}"] = round(float(np.mean(ratios > threshold)), 4)
    return {
        "novelty_auroc": round(float(np.mean(list(areas.values()))), 4),
        "novelty_worst_auroc": round(min(areas.values()), 4),
        "novelty_false_alarm_ratio": round(float(np.mean(familiar > threshold)), 4),
        "novelty_threshold": round(threshold, 4),
        **found,
        **cost_us(predictor),
    }


def routing_figures(fleet: Fleet | None = None, artifact: Artifact | None = None) -> dict[str, Any]:
    """Where foreign and familiar prompts go, with the artifact's bitmap and without it.

    By default in the reference fleet with its shipped predictor. Generalists are the SLMs with a
    generality above 0.5. Diverted are familiar prompts that another SLM gets because of the bitmap.
    """
    fleet = fleet or parse_fleet(fleet_file("reference"), FLEETS)
    artifact = artifact or load_artifact(PREDICTOR)
    generalists = {s.id for s in fleet.slms if fleet.generality(s) > GENERALIST_ABOVE}
    found: dict[str, Any] = {}
    shares: dict[str, list[float]] = {"": [], "_without_bitmap": []}
    blind = replace(artifact, seen=None)
    for name, prompts in foreign_prompts().items():
        for suffix, used in (("", artifact), ("_without_bitmap", blind)):
            share = float(np.mean([s in generalists for s in choices(fleet, used, prompts)]))
            shares[suffix].append(share)
            found[f"unfamiliar_to_generalist_ratio{suffix}.{name}"] = round(share, 4)
    for suffix, each in shares.items():
        found[f"unfamiliar_to_generalist_ratio{suffix}"] = round(float(np.mean(each)), 4)
    prompts = familiar_prompts()
    pairs = zip(choices(fleet, artifact, prompts), choices(fleet, blind, prompts), strict=True)
    found["familiar_diverted_ratio"] = round(float(np.mean([a != b for a, b in pairs])), 4)
    return found


def choices(fleet: Fleet, artifact: Artifact, prompts: Sequence[str]) -> list[str]:
    """The SLM that `auto` chooses for each prompt while all are idle, without exploration."""
    predictor = LightGBMPredictor(artifact, MetadataPrior())
    selector = ModelSelector(fleet, Goals(exploration_ratio=0.0), predictor=predictor)
    asked = [parse_chat({"messages": [{"role": "user", "content": text}]}) for text in prompts]
    return [selector.decide(r, Overrides(), f"novelty-{i}").slm_id for i, r in enumerate(asked)]


def auroc(familiar: Ratios, foreign: Ratios) -> float:
    """Area under the receiver operating characteristic; ties count half."""
    ordered = np.sort(familiar)
    below = np.searchsorted(ordered, foreign) + np.searchsorted(ordered, foreign, side="right")
    return float(below.mean() / (2 * len(familiar)))


def cost_us(predictor: LightGBMPredictor) -> Mapping[str, float]:
    """Microseconds for a prompt of TIMED_CHARS: the bits from its hashes, and their lookup.

    The hashes themselves are part of the features. The least of TIMED_ROUNDS means, because other
    processes only add to it.
    """
    hashes = text_hashes(" ".join(foreign_prompts()["gsm8k"])[:TIMED_CHARS])
    least = float("inf")
    for _ in range(TIMED_ROUNDS):
        started = time.perf_counter()
        for _ in range(TIMED_RUNS):
            predictor.novelty(token_bits(hashes))
        least = min(least, time.perf_counter() - started)
    return {"novelty_cost_us": round(least / TIMED_RUNS * 1e6, 2)}


def _letters(rng: Random) -> str:
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(*LETTER_CHARS)))


def _ratios(predictor: LightGBMPredictor, prompts: Sequence[str]) -> tuple[Ratios, float | None]:
    """Each prompt's novelty, and the threshold; a prompt without words has no novelty."""
    found = [predictor.novelty(text_bits(prompt)) for prompt in prompts]
    known = [novelty for novelty in found if novelty is not None]
    return np.array([n.ratio for n in known]), known[0].threshold if known else None
