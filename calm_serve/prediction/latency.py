"""Analytic latency and energy of an SLM from its live state and metadata.

Measurements correct it: learned residuals (`lightgbm.py`), and `SLMState.ttft_ratio`, which follows
the last answers. They multiply it and never replace it, so a load that was never seen still has a
plausible prediction.
"""

from __future__ import annotations

from calm_serve.config import SLMSpec
from calm_serve.types import Residency, SLMState, Task

# Relative increase of TPOT when every slot is busy. Measured: 1.4 to 1.6 times between 1 and 16
# requests on small models on a CPU (2 to 24 layers).
BATCH_SLOWDOWN = 0.5
# Share of the prefill that a fully cached prompt saves; the last block is always computed.
CACHED_SAVING = 0.8
PRIOR_PROMPT_TOKENS = 128.0  # prompt length for which `priors.ttft_s` is stated
FIXED_PREFILL_RATIO = 0.5  # share of that TTFT which does not depend on the prompt's length


def analytic_tpot_s(spec: SLMSpec, state: SLMState) -> float:
    """Seconds per output token at the present load."""
    if state.tpot_s is not None:
        return state.tpot_s
    return spec.priors.tpot_s * (1.0 + BATCH_SLOWDOWN * min(state.load_ratio, 1.0))


def analytic_ttft_s(
    spec: SLMSpec, state: SLMState, prompt_tokens: int, cached_ratio: float = 0.0
) -> float:
    """Seconds to the first token: prefill, wait for a slot, and wake-up."""
    return awake_ttft_s(spec, state, prompt_tokens, cached_ratio) + wake_s(spec, state)


def awake_ttft_s(
    spec: SLMSpec, state: SLMState, prompt_tokens: int, cached_ratio: float = 0.0
) -> float:
    """Seconds to the first token of an SLM that is awake.

    Part of the prefill is in proportion to `prompt_tokens`; the prior is stated for a prompt of
    PRIOR_PROMPT_TOKENS.
    """
    size = FIXED_PREFILL_RATIO + (1.0 - FIXED_PREFILL_RATIO) * prompt_tokens / PRIOR_PROMPT_TOKENS
    prefill = spec.priors.ttft_s * size * (1.0 - CACHED_SAVING * cached_ratio)
    ahead = max(0, state.running + state.waiting + 1 - max(state.capacity, 1))
    wait = 0.0
    if ahead:
        service_s = spec.priors.ttft_s  # all of it, where nothing is generated
        if spec.task is Task.GENERATE:
            service_s = analytic_tpot_s(spec, state) * spec.priors.output_tokens
        wait = service_s * ahead / max(state.capacity, 1)
    return prefill + wait


def cached_prefill_s(spec: SLMSpec, state: SLMState, cached_tokens: float) -> float:
    """Seconds of prefill that the SLM saves by having so many tokens of a prompt in its cache."""
    per_token_s = spec.priors.ttft_s * (1.0 - FIXED_PREFILL_RATIO) / PRIOR_PROMPT_TOKENS
    return CACHED_SAVING * per_token_s * cached_tokens * state.ttft_ratio


def wake_s(spec: SLMSpec, state: SLMState) -> float:
    """Seconds until the SLM is awake."""
    return 0.0 if state.residency is Residency.HOT else spec.wake_s(state.wake_s)


def energy_j(spec: SLMSpec, state: SLMState, output_tokens: float) -> float:
    """Joules of an answer of `output_tokens`, from measured joules per token, else the prior."""
    per_token = state.energy_j_per_token
    return output_tokens * (spec.priors.energy_j_per_token if per_token is None else per_token)
