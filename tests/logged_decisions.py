"""Outcomes of a real ModelSelector with known truth, logged as a router logs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

from calm_serve.config import Goals, SLMSpec
from calm_serve.learning.decision_log import decision_terms
from calm_serve.prediction.base import Predictor, live_load
from calm_serve.requests.features import NUMBER_NAMES
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import decision_for
from calm_serve.types import Outcome, QualitySignal, SLMState
from tests.knowledge_data import CODER, make_context, make_fleet, make_outcome, make_state

Truth = Callable[[bool, str], float]  # (code, SLM) to P(success)


def right_for_its_kind(code: bool, slm_id: str) -> float:
    """P(success) in `knowledge_data`'s world."""
    return 0.95 if code == (slm_id == CODER) else 0.1


def serve(
    count: int,
    goals: Goals,
    predictor: Predictor | None = None,
    *,
    truth: Truth = right_for_its_kind,
    seed: int = 0,
    start_s: float = 1000.0,
    **context: Any,
) -> list[Outcome]:
    """`count` labelled outcomes of scored requests, one a second, under changing load."""
    return list(_serve(count, goals, predictor, truth, Random(seed), start_s, context))


# The log has a request's token limit as a feature only, and these requests have no limit.
_FEATURES = {
    code: replace(make_context(code).features, numbers=(0.0,) * len(NUMBER_NAMES))
    for code in (False, True)
}


def _serve(
    count: int,
    goals: Goals,
    predictor: Predictor | None,
    truth: Truth,
    random: Random,
    start_s: float,
    context: dict[str, Any],
) -> Iterator[Outcome]:
    states: dict[str, SLMState] = {}

    def read(spec: SLMSpec) -> SLMState:
        return states[spec.id]

    fleet = make_fleet()
    selector = ModelSelector(fleet, goals, read_state=read, predictor=predictor)
    for i in range(count):
        for spec in fleet.slms:
            states[spec.id] = make_state(spec.id, waiting=random.randrange(12))
        code = random.random() < 0.5
        values = {"features": _FEATURES[code], **context}
        asked = make_context(code, request_id=f"{start_s:g}-{i}", **values)
        decision = decision_for(selector, asked)
        chosen = next(c for c in decision.candidates if c.slm_id == decision.slm_id)
        assert chosen.prediction is not None
        good = random.random() < truth(code, decision.slm_id)
        yield make_outcome(
            asked.request_id,
            at=start_s + i,
            slm_id=decision.slm_id,
            path=str(decision.path),
            reason=str(decision.reason),
            propensity=decision.propensity,
            e2e_s=chosen.prediction.e2e_s * 1.5,
            energy_j=chosen.prediction.energy_j,
            numbers=asked.features.numbers,
            buckets=asked.features.buckets,
            load_features=live_load(
                asked, selector.specs[decision.slm_id], states[decision.slm_id]
            ),
            predicted=chosen.prediction,
            versions=decision.versions,
            signals=(QualitySignal("feedback", float(good), start_s + i + 0.5),),
            terms=decision_terms(decision),
        )
