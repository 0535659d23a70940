"""What the decision asks of any predictor: one batched call over all candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from calm_serve.analyze.features import load_vector
from calm_serve.analyze.latency import analytic_ttft_s
from calm_serve.config import SLMSpec
from calm_serve.types import Prediction, RoutingContext, SLMState


class Predictor(Protocol):
    """Expected outcome of one request on each candidate SLM."""

    version: str

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order; `states` runs parallel to `specs`."""
        ...


def live_load(context: RoutingContext, spec: SLMSpec, state: SLMState) -> tuple[float, ...]:
    """The live-state features of one candidate, in the order of LOAD_NAMES.

    A predictor reads them and the router logs them as `Outcome.load`; both call this function, so
    training sees exactly what prediction saw.
    """
    analytic = analytic_ttft_s(spec, state, context.prompt_tokens, state.cached_prefix_ratio)
    return load_vector(spec, state, analytic)
