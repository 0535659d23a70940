"""A small world with a known truth, for tests of the knowledge side.

Prompts with bucket CODE are answered well by "coder" only, all others by "talker" only. Answers of
"talker" are long, and its TTFT is three times the analytic one.
"""

from __future__ import annotations

import math
import random
from typing import Any

from calm_serve import testing
from calm_serve.config import Fleet, SLMSpec
from calm_serve.prediction.base import LOAD_NAMES, live_load
from calm_serve.requests.features import NUMBER_NAMES
from calm_serve.types import (
    Outcome,
    OutputShape,
    Prediction,
    PredictorVersion,
    PromptFeatures,
    QualitySignal,
    Residency,
    RoutingContext,
    SLMState,
    Versions,
)

CODE, OTHER, ANY = 1207, 1211, 1203  # buckets
CODER, TALKER = "coder", "talker"


def make_fleet(**changes: Any) -> Fleet:
    """Two SLMs; `changes` are fields of Fleet."""
    return Fleet(slms=(make_spec(CODER), make_spec(TALKER)), **changes)


def make_spec(slm_id: str) -> SLMSpec:
    """An SLM with the default metadata."""
    return SLMSpec(id=slm_id, model="example/model")


def make_state(slm_id: str, **changes: Any) -> SLMState:
    """An awake, idle SLM."""
    values: dict[str, Any] = {"residency": Residency.HOT, "replicas": 1, "capacity": 8}
    return SLMState(slm_id=slm_id, **{**values, **changes})


def make_context(code: bool, **changes: Any) -> RoutingContext:
    """A request with or without the CODE bucket."""
    values: dict[str, Any] = {
        "request_id": "r",
        "requested_model": "auto",
        "prompt_chars": 400,
        "prompt_tokens": 100,
        "max_output_tokens": None,
        "output_shape": OutputShape.TEXT,
        "turns": 1,
        "stream": False,
        "language": "en",
        "has_code": False,
        "safety_class": "none",
        "markers": (),
        "session_key": "",
        "prefix_family": "0",
        "prefix_chain": (0,),
        "features": PromptFeatures(
            (1.0,) * len(NUMBER_NAMES), (ANY, CODE) if code else (ANY, OTHER)
        ),
    }
    return RoutingContext(**{**values, **changes})


def make_outcome(outcome_id: str, **changes: Any) -> Outcome:
    """One answered request of the coder."""
    slm_id = changes.get("slm_id", CODER)
    usual = testing.make_outcome(
        outcome_id,
        slm_id=slm_id,
        propensity=0.9,
        predicted_replica="a",
        replica_id="b",
        e2e_s=0.7,
        decision_s=0.0005,
        energy_j=1.5,
        buckets=(ANY, CODE),
        predicted=Prediction(slm_id, 0.5, 64.0, 0.05, 0.01, 6.4),
        versions=Versions(PredictorVersion("prior"), "g1", "f1"),
    )
    return testing.change_outcome(usual, **changes)


def make_world(count: int, seed: int = 0, *, truth: bool = True) -> list[Outcome]:
    """`count` labelled outcomes, one a second; without `truth` the labels are coin flips."""
    randomness = random.Random(seed)
    return [_lived(i, randomness, truth) for i in range(count)]


def _lived(i: int, randomness: random.Random, truth: bool) -> Outcome:
    code = randomness.random() < 0.5
    slm_id = randomness.choice((CODER, TALKER))
    right = code == (slm_id == CODER)
    good = randomness.random() < ((0.95 if right else 0.1) if truth else 0.5)
    context, state = make_context(code), make_state(slm_id, waiting=randomness.randrange(4))
    load = live_load(context, make_spec(slm_id), state)
    slowdown = 3.0 if slm_id == TALKER else 1.0
    return make_outcome(
        f"o{i}",
        at=1000.0 + i,
        slm_id=slm_id,
        buckets=context.features.buckets,
        load_features=load,
        ttft_s=math.exp(load[LOAD_NAMES.index("log_analytic_ttft")]) * slowdown,
        output_tokens=200 if slm_id == TALKER else 10,
        signals=(QualitySignal("feedback", 1.0 if good else 0.0, 1000.5 + i),),
    )
