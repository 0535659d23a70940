"""Novelty: what the bitmap remembers, what it calls unfamiliar, and how it is stored."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from random import Random

import pytest

from calm_serve.errors import KnowledgeError
from calm_serve.prediction import Artifact, LightGBMPredictor, MetadataPrior, load_artifact
from calm_serve.prediction.novelty import (
    FALSE_ALARM_RATIO,
    MAX_SET_RATIO,
    MIN_PROMPTS,
    NoveltyDetector,
    SeenPrompts,
    fit_seen_prompts,
)
from calm_serve.requests import text_bits
from calm_serve.types import SEEN_BITS, Novelty
from deployments.reference_fleet.paths import PREDICTOR

WORDS = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(300)]


def sentences(count: int, seed: int, words: list[str] = WORDS) -> list[tuple[int, ...]]:
    """Prompts of ten words, frequent ones at the list's start."""
    random = Random(seed)
    size = len(words)
    return [
        text_bits(
            " ".join(words[min(int(random.expovariate(8.0) * size), size - 1)] for _ in range(10))
        )
        for _ in range(count)
    ]


def fitted(prompts: list[tuple[int, ...]]) -> SeenPrompts:
    seen = fit_seen_prompts(prompts)
    assert seen is not None
    return seen


def test_familiar_prompts_are_rarely_unfamiliar_and_foreign_ones_mostly() -> None:
    detector = NoveltyDetector(fitted(sentences(1500, seed=1)))
    found = [detector.novelty(bits) for bits in sentences(1000, seed=2)]
    alarms = sum(n is not None and n.unfamiliar for n in found) / len(found)
    assert 0.2 * FALSE_ALARM_RATIO < alarms < 1.5 * FALSE_ALARM_RATIO
    foreign = sentences(200, seed=3, words=[word[::-1] for word in WORDS])
    assert sum(n is not None and n.unfamiliar for n in map(detector.novelty, foreign)) > 190


def test_the_ratio_grows_with_new_words_and_stays_below_one() -> None:
    detector = NoveltyDetector(fitted(sentences(1500, seed=1)))
    known = " ".join(WORDS[:4])
    found = [
        detector.novelty(text_bits(text))
        for text in (f"{known} {known}", f"{known} qqq zzz", "qqq zzz xxx vvv " * 20)
    ]
    ratios = [novelty.ratio for novelty in found if novelty is not None]
    assert 0.0 <= ratios[0] < ratios[1] < ratios[2] < 1.0


def test_what_one_prompt_alone_has_stays_new() -> None:
    prompts = sentences(MIN_PROMPTS, seed=4)
    once, twice = text_bits("zebra xylophone quartz"), text_bits("vortex jigsaw kimono")
    detector = NoveltyDetector(
        fitted([*prompts, once, twice, text_bits("vortex jigsaw kimono again")])
    )
    seen_once, seen_twice = detector.novelty(once), detector.novelty(twice)
    assert seen_once is not None and seen_twice is not None
    assert seen_twice.ratio == 0.0 < seen_once.ratio


def test_a_prompt_without_words_has_no_novelty() -> None:
    assert NoveltyDetector(fitted(sentences(200, 1))).novelty(()) is None


def test_equal_prompts_count_once_and_too_few_give_no_threshold() -> None:
    prompts = sentences(MIN_PROMPTS, seed=5)
    assert len(set(prompts)) == MIN_PROMPTS
    assert fit_seen_prompts(prompts) == fit_seen_prompts([*prompts, *prompts])
    assert fit_seen_prompts(prompts[1:]) is None
    assert fit_seen_prompts([*prompts[1:], *prompts[1:], ()]) is None


def test_the_bitmap_never_fills_up() -> None:
    random = Random(6)
    prompts = [tuple(random.sample(range(SEEN_BITS), 120)) for _ in range(3000)]
    seen = fitted(prompts)
    assert 0.0 < sum(byte.bit_count() for byte in seen.bitmap) <= MAX_SET_RATIO * SEEN_BITS


def artifact(seen: SeenPrompts | None) -> Artifact:
    return Artifact("v", (), {}, {}, 0, 0.0, seen=seen)


def test_an_artifact_keeps_the_bitmap() -> None:
    seen = fitted(sentences(200, 1))
    read = Artifact.from_bytes(artifact(seen).to_bytes())
    assert read == artifact(seen)
    predictor = LightGBMPredictor(read, MetadataPrior())
    assert predictor.novelty(text_bits("qqq zzz")) == NoveltyDetector(seen).novelty(
        text_bits("qqq zzz")
    )


def test_a_newer_prompt_needs_a_better_prediction() -> None:
    assert not Novelty(0.0, 0.4).outweighs(0.0)
    half = Novelty(0.2, 0.4)
    assert half.outweighs(0.06) and not half.outweighs(0.07)
    assert Novelty(0.41, 0.4).outweighs(1.0)


@pytest.mark.parametrize("change", [{"bitmap": "AAAA"}, {"bitmap": "?"}, {"threshold": "high"}])
def test_a_damaged_bitmap_is_refused(change: dict[str, str]) -> None:
    document = json.loads(zlib.decompress(artifact(fitted(sentences(200, 1))).to_bytes()))
    document["seen"] |= change
    with pytest.raises(KnowledgeError, match="not a predictor artifact"):
        Artifact.from_bytes(zlib.compress(json.dumps(document).encode()))


def test_the_shipped_predictor_knows_its_own_kinds_of_prompts() -> None:
    predictor = LightGBMPredictor(load_artifact(PREDICTOR), MetadataPrior())
    known = predictor.novelty(text_bits("list all files in the current directory"))
    foreign = predictor.novelty(text_bits("Explique por que as folhas mudam de cor no outono."))
    assert known is not None and foreign is not None
    assert foreign.unfamiliar and not known.unfamiliar


def test_another_bitmap_is_another_version() -> None:
    seen = fitted(sentences(200, 1))
    versions = {
        Artifact("", (), {}, {}, 0, 0.0, seen=one).content_hash()
        for one in (None, seen, replace(seen, threshold=seen.threshold / 2))
    }
    assert len(versions) == 3
