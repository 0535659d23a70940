"""Predictions before anything was learned: the metadata file's priors, never zeros."""

from __future__ import annotations

from collections.abc import Sequence

from calm_serve.analyze.latency import analytic_tpot_s, awake_ttft_s, energy_j, wake_s
from calm_serve.config import SLMSpec
from calm_serve.types import Prediction, RoutingContext, SLMState


class MetadataPrior:
    """A predictor that knows the fleet file only.

    A marker whose name is one of the SLM's skills raises P(success) from `priors.quality` to
    `priors.skill_quality`; with no marker at all every SLM keeps `priors.quality`.
    """

    version = "prior"

    def predict(
        self, context: RoutingContext, specs: Sequence[SLMSpec], states: Sequence[SLMState]
    ) -> list[Prediction]:
        """Return one Prediction per spec, in order."""
        return [
            prior_prediction(context, spec, state)
            for spec, state in zip(specs, states, strict=True)
        ]


def prior_prediction(context: RoutingContext, spec: SLMSpec, state: SLMState) -> Prediction:
    """The prior for one SLM."""
    priors = spec.priors
    matches = not set(context.markers).isdisjoint(spec.skills)
    tokens = priors.output_tokens
    if context.max_output_tokens is not None:
        tokens = min(tokens, float(context.max_output_tokens))
    return Prediction(
        slm_id=spec.id,
        success_ratio=priors.skill_quality if matches else priors.quality,
        output_tokens=tokens,
        ttft_s=awake_ttft_s(spec, state, context.prompt_tokens) * state.ttft_ratio
        + wake_s(spec, state),
        tpot_s=analytic_tpot_s(spec, state),
        energy_j=energy_j(spec, state, tokens),
        ttft_spread=state.ttft_spread,
        e2e_spread=state.e2e_spread,
    )
