"""A synthetic fleet, its prompts, and a predictor trained on synthetic outcomes, all seeded.

Markers and safety patterns are those of the reference fleet. Only the cost of a decision is
measured with it, not its quality: outcomes only have to be hard enough to learn that the predictor
grows as many trees as the shipped one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from calm_serve.config import Fleet
from calm_serve.learning import train
from calm_serve.prediction import Artifact, live_load
from calm_serve.requests import BUCKETS, ContextBuilder, Overrides, fill_features, parse_chat
from calm_serve.testing import make_outcome, make_state
from calm_serve.types import FIRST_WORD, QualitySignal, RoutingContext, SLMState

REFERENCE = Path("deployments/fleets/reference.yaml")
SEED = 2602
OUTCOMES_PER_SLM = 1000  # served outcomes that the predictor learns from

# Words of each skill's requests; none is a marker, so that scoring decides.
TOPICS = {
    "extract": "play playlist song book restaurant table weather tomorrow rating movie album",
    "sql": "which student course credits average maximum team points result where season listed",
    "shell": "find files directory recursively delete print lines count archive process permission",
    "reason": "apples bottles dollars bought gave each left more total twice hours pages",
    "intent": "balance transfer account card alarm flight translate calories recipe insurance",
    "chat": "king love night sweet lord heart death father crown fair grace honour",
}
COMMON = (
    "the a an is are of to in and for with on my me you it was by at from that this there please "
    "what how many number name all don't it's first last new old good small 2 7 35 120 1,500 3.5"
)
RULE_PREFIX = {"fast": "Write SQL: ", "scored": "", "pinned": ""}


@dataclass(frozen=True)
class World:
    """A fleet of one size, the state of its SLMs as a router sees it, and its predictor."""

    fleet: Fleet
    states: dict[str, SLMState]
    artifact: Artifact


def make_world(slms: int) -> World:
    """The world of `slms` SLMs; the same for the same number."""
    fleet = _fleet(slms)
    rng = Random(SEED + slms)
    states = {
        s.id: make_state(
            s.id,
            running=rng.randrange(12),
            waiting=rng.randrange(3),
            kv_usage_ratio=rng.random(),
            cached_prefix_ratio=rng.random() / 2,
            tpot_s=rng.uniform(0.002, 0.01),
            energy_j_per_token=rng.uniform(0.01, 0.03),
        )
        for s in fleet.slms
    }
    return World(fleet, states, _trained(fleet, rng))


def body(path: str, chars: int, rng: Random, fleet: Fleet) -> bytes:
    """A chat request whose prompt has `chars` characters and is decided by `path`."""
    text = prompt(rng.choice(list(TOPICS)), chars, rng, RULE_PREFIX[path])
    model = rng.choice(fleet.slms).id if path == "pinned" else "auto"
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": 128}).encode()


def prompt(topic: str, chars: int, rng: Random, start: str = "") -> str:
    """Sentences of `topic`, exactly `chars` characters long."""
    own, common = TOPICS[topic].split(), COMMON.split()
    text, size = [start], len(start)
    while size < chars:
        words = [
            rng.choice(own if rng.random() < 0.4 else common) for _ in range(rng.randrange(5, 15))
        ]
        sentence = " ".join(words).capitalize() + rng.choice((". ", "? ", ", ", ".\n"))
        text.append(sentence)
        size += len(sentence)
    return "".join(text)[:chars]


def _fleet(slms: int) -> Fleet:
    reference = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    skills = list(reference["markers"])
    specs: list[dict[str, Any]] = [
        {
            "id": f"{skills[i % len(skills)]}-{i}",
            "model": "example/model",
            "skills": [skills[i % len(skills)]],
            "context_tokens": 32_768,
            "parameters": 2_000_000 * (1 + i % 5),
        }
        for i in range(slms)
    ]
    rules = [
        {
            "name": f"names-{skill}",
            "marker": skill,
            "without": [other for other in skills if other != skill],
            "slms": [specs[i % slms]["id"]],
        }
        for i, skill in enumerate(skills)
    ]
    safety = [{**s, "slm": specs[0]["id"]} for s in reference["safety"]]
    return Fleet.model_validate(
        {"slms": specs, "markers": reference["markers"], "rules": rules, "safety": safety}
    )


def _trained(fleet: Fleet, rng: Random) -> Artifact:
    builder = ContextBuilder(fleet)
    outcomes = []
    for i in range(OUTCOMES_PER_SLM * len(fleet.slms)):
        topic, chars = rng.choice(list(TOPICS)), rng.choice((40, 80, 200, 600))
        spec = rng.choice(fleet.slms)
        request = {"messages": [{"role": "user", "content": prompt(topic, chars, rng)}]}
        parsed = parse_chat(request)
        context = builder.build(parsed, Overrides(), f"o{i}")
        fill_features(context, parsed)
        state = make_state(spec.id, running=rng.randrange(16), waiting=rng.randrange(4))
        load = live_load(context, spec, state)
        success = _success_ratio(topic, context, spec.skills[0], spec.parameters)
        outcomes.append(
            make_outcome(
                f"o{i}",
                at=1000.0 + i,
                slm_id=spec.id,
                numbers=context.features.numbers,
                buckets=context.features.buckets,
                load_features=load,
                ttft_s=math.exp(load[-1] + _slowdown(spec.id, load, chars) + rng.gauss(0.0, 0.02)),
                output_tokens=_answer_tokens(spec.id, context, rng),
                signals=(QualitySignal("feedback", float(rng.random() < success), 1001.0 + i),),
            )
        )
    ids = [s.id for s in fleet.slms]
    return train(outcomes, ids, seed=SEED, holdout_ratio=0.2, clock=lambda: 0.0).artifact


def _slowdown(slm_id: str, load: tuple[float, ...], chars: int) -> float:
    base, slope = _weights(slm_id)[:2]
    return 0.3 * base + 0.3 * abs(slope) * load[0] + 0.1 * math.sin(chars / 50) + load[1] / 9


def _answer_tokens(slm_id: str, context: RoutingContext, rng: Random) -> int:
    weights = _weights(slm_id)
    wordy = sum(abs(weights[b - FIRST_WORD]) for b in context.features.buckets)
    return max(2, int(rng.gauss(20 + 20 * abs(weights[0]) + 2 * wordy, 2)))


def _success_ratio(topic: str, context: RoutingContext, skill: str, parameters: int) -> float:
    """The true P(success): an SLM's own topic is easy, long prompts are hard, many words matter."""
    weights = _weights(skill)
    words = sum(weights[b - FIRST_WORD] for b in context.features.buckets) / math.sqrt(
        len(context.features.buckets) + 1
    )
    own = 1.5 if skill == topic else -0.5
    logit = own + 2.5 * words - context.prompt_chars / 600 + parameters / 5e6
    return 1.0 / (1.0 + math.exp(-4.0 * logit))


@cache
def _weights(name: str) -> list[float]:
    rng = Random(name)
    return [rng.gauss(0.0, 1.0) for _ in range(BUCKETS)]
