"""The predictor protocol, and the metadata prior that is used before anything was learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from calm_serve.config import SLMSpec
from calm_serve.prediction.latency import (
    analytic_tpot_s,
    analytic_ttft_s,
    awake_ttft_s,
    energy_j,
    wake_s,
)
from calm_serve.types import (
    Novelty,
    Prediction,
    PredictorVersion,
    RoutingContext,
    SLMState,
    Task,
)

LOAD_NAMES: tuple[str, ...] = (
    "load_ratio",
    "waiting",
    "kv_usage_ratio",
    "cached_prefix_ratio",
    "hot",
    "log_analytic_ttft",
)


MIN_TTFT_S = 1e-6  # keeps its logarithm finite


class Predictor(Protocol):
    """Expected outcome of one request on each candidate SLM."""

    version: PredictorVersion

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order; `states` runs parallel to `specs`."""
        ...

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        """Return how unlike its training prompts a prompt with these bits is; None if unknown."""
        ...


def live_load(context: RoutingContext, spec: SLMSpec, state: SLMState) -> tuple[float, ...]:
    """The live-state features of one candidate, in the order of LOAD_NAMES.

    Predictors read them and the router logs them (`DecisionSummary.load_features`); both call this
    function, so training gets exactly the features of the prediction.
    """
    analytic = analytic_ttft_s(spec, state, context.prompt_tokens, state.cached_prefix_ratio)
    return load_vector(state, analytic)


def load_vector(state: SLMState, analytic_ttft_s: float) -> tuple[float, ...]:
    """Live-state features of one candidate, in the order of LOAD_NAMES."""
    return (
        state.load_ratio,
        float(state.waiting),
        state.kv_usage_ratio,
        state.cached_prefix_ratio,
        1.0 if state.replicas else 0.0,
        math.log(max(analytic_ttft_s, MIN_TTFT_S)),
    )


class MetadataPrior:
    """Predictions from the fleet file alone.

    A marker whose name is one of the SLM's skills raises P(success) from `priors.quality` to
    `priors.skill_quality`; with no marker at all every SLM keeps `priors.quality`.
    """

    version = PredictorVersion("prior")

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order."""
        return [
            prior_prediction(context, spec, state)
            for spec, state in zip(specs, states, strict=True)
        ]

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        """Return None: nothing was trained."""
        del bits
        return None


def prior_quality(context: RoutingContext, spec: SLMSpec) -> float:
    """P(success) by the fleet file: higher where a marker is named like a skill of the SLM."""
    matches = not set(context.markers).isdisjoint(spec.skills)
    return spec.priors.skill_quality if matches else spec.priors.quality


def prior_prediction(context: RoutingContext, spec: SLMSpec, state: SLMState) -> Prediction:
    """The prior for one SLM. One that generates nothing has no output, and joules by its input."""
    priors = spec.priors
    tokens = priors.output_tokens
    if context.max_output_tokens is not None:
        tokens = min(tokens, float(context.max_output_tokens))
    energy_tokens = tokens
    if spec.task is not Task.GENERATE:
        tokens, energy_tokens = 0.0, float(context.prompt_tokens)
    return Prediction(
        slm_id=spec.id,
        success_ratio=prior_quality(context, spec),
        output_tokens=tokens,
        ttft_s=awake_ttft_s(spec, state, context.prompt_tokens) * state.ttft_ratio
        + wake_s(spec, state),
        tpot_s=analytic_tpot_s(spec, state),
        energy_j=energy_j(spec, state, energy_tokens),
        ttft_spread=state.ttft_spread,
        e2e_spread=state.e2e_spread,
    )
