"""Hard filters: they exclude candidates and are never relaxed, except the language filter.

A filter returns True when the SLM may serve the request. Their order decides only which filter's
name the explanation shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from calm_serve.config import SLMSpec
from calm_serve.errors import NoCandidateError, SLMUnavailableError
from calm_serve.types import Candidate, OutputShape, RoutingContext, SLMState

Filter = Callable[[RoutingContext, SLMSpec, SLMState], bool]

# A prompt is too long when its estimated tokens divided by this exceed the context. The engine
# counts exactly and answers 400 when the estimate was too low.
ESTIMATE_TOLERANCE = 2.0


def fits_context(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """Prompt and requested output fit the SLM's context."""
    del state
    tokens = context.prompt_tokens / ESTIMATE_TOLERANCE + (context.max_output_tokens or 0)
    return tokens <= spec.context_tokens


def has_capability(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """The SLM supports the images, tools or structured output of the request."""
    del state
    supported = spec.capabilities
    if context.has_image and not supported.vision:
        return False
    if context.output_shape is OutputShape.TOOLS:
        return supported.tools
    if context.output_shape is OutputShape.TEXT:
        return True
    return supported.json_output


def has_adapter(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """The SLM has the adapter that the client named."""
    del state
    return not context.adapter or any(a.name == context.adapter for a in spec.adapters)


def speaks_language(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """The SLM lists the prompt's language, or lists none, or the language is unknown."""
    del state
    return not spec.languages or context.language in ("und", *spec.languages)


def obeys_data_policy(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """Sensitive requests stay on local SLMs."""
    del state
    return not context.local_only or spec.locality == "local"


def is_healthy(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """The SLM's circuit breaker is closed."""
    del context, spec
    return not state.breaker_open


def is_available(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """At least one replica runs, or one may be started for this request."""
    del context
    return state.replicas > 0 or spec.residency == "on_demand" or spec.locality == "remote"


FILTERS: dict[str, Filter] = {
    "context_length": fits_context,
    "capability": has_capability,
    "adapter": has_adapter,
    "data_policy": obeys_data_policy,
    "breaker": is_healthy,
    "available": is_available,
    "language": speaks_language,  # last: an SLM excluded by it passed everything else
}
# When no SLM passes, those that only this filter excluded are tried: a poor answer beats none.
RELAXED_IF_NONE_PASSES = "language"
# Filters of a pinned request: the language and the circuit breaker do not count, because the client
# chose the SLM; what the SLM cannot do, and the data policy, still exclude it.
PINNED_FILTERS = ("context_length", "capability", "adapter", "data_policy", "available")
_EVERY = tuple(FILTERS.items())
_PINNED = tuple((name, FILTERS[name]) for name in PINNED_FILTERS)
# Filters of a plain request (see `is_plain`), which is most of them.
_PLAIN = tuple(
    (name, keep)
    for name, keep in FILTERS.items()
    if name not in ("capability", "adapter", "data_policy")
)


def is_plain(context: RoutingContext) -> bool:
    """Return whether the request is for text only: no image, no adapter, no data policy."""
    return not (
        context.has_image
        or context.local_only
        or context.adapter
        or context.output_shape is not OutputShape.TEXT
    )


def excluded_by(
    context: RoutingContext,
    spec: SLMSpec,
    state: SLMState,
    *,
    pinned: bool = False,
    plain: bool = False,
) -> str:
    """Return the name of the first filter that excludes the SLM, "" when none does.

    `plain` is `is_plain(context)`; it skips the filters that cannot exclude anything then.
    """
    for name, keep in _PINNED if pinned else _PLAIN if plain else _EVERY:
        if not keep(context, spec, state):
            return name
    return ""


def split(
    context: RoutingContext, specs: Mapping[str, SLMSpec], states: Mapping[str, SLMState]
) -> tuple[list[str], list[Candidate]]:
    """Return ids of SLMs that may serve the request, and the excluded ones with their filter.

    Raises SLMUnavailableError or NoCandidateError, with each SLM's filter, when all are excluded.
    """
    allowed: list[str] = []
    excluded: list[Candidate] = []
    plain = is_plain(context)
    for slm_id, spec in specs.items():
        why = excluded_by(context, spec, states[slm_id], plain=plain)
        if why:
            excluded.append(Candidate(slm_id=slm_id, excluded_by=why))
        else:
            allowed.append(slm_id)
    if not allowed:
        soft = RELAXED_IF_NONE_PASSES
        allowed = [c.slm_id for c in excluded if c.excluded_by == soft]
        excluded = [c for c in excluded if c.excluded_by != soft]
    if not allowed:
        reasons = ", ".join(f"{c.slm_id}: {c.excluded_by}" for c in excluded)
        if all(c.excluded_by in ("available", "breaker") for c in excluded):
            raise SLMUnavailableError(f"no SLM is available ({reasons})")
        raise NoCandidateError(f"no SLM can take this request ({reasons})")
    return allowed, excluded
