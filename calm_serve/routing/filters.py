"""Hard filters: they remove candidates, and no fallback ever relaxes them (language excepted).

Each filter answers with True when the SLM may serve the request. Order only matters for the name
shown in the explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from calm_serve.config import SLMSpec
from calm_serve.errors import NoCandidateError, SLMUnavailableError
from calm_serve.types import Candidate, OutputShape, RoutingContext, SLMState

Filter = Callable[[RoutingContext, SLMSpec, SLMState], bool]

# Estimated tokens may be wrong by this factor before a prompt is called too long; the engine
# counts for real and answers 400 itself when the estimate was too kind.
ESTIMATE_TOLERANCE = 2.0


def fits_context(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """Prompt, and the output asked for, fit the SLM's context."""
    del state
    wanted = context.prompt_tokens / ESTIMATE_TOLERANCE + (context.max_output_tokens or 0)
    return wanted <= spec.context_tokens


def has_capability(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """Tools, structured output and images only go where they work."""
    del state
    can = spec.capabilities
    if context.has_image and not can.vision:
        return False
    if context.output_shape is OutputShape.TOOLS:
        return can.tools
    if context.output_shape is OutputShape.TEXT:
        return True
    return can.json_output


def has_adapter(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """A pinned adapter exists on the SLM."""
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
# A language nobody in the fleet claims is tried anyway: a poor answer beats none.
RELAXED_IF_NOBODY_PASSES = "language"
# What a pinned request is held to: the client may insist on a language or on a struggling SLM,
# but not on what cannot work or must not happen.
PINNED_FILTERS = ("context_length", "capability", "adapter", "data_policy", "available")
_EVERY = tuple(FILTERS.items())
_PINNED = tuple((name, FILTERS[name]) for name in PINNED_FILTERS)
# Most requests ask for text from whoever is best: nothing that an SLM might lack.
_PLAIN = tuple(
    (name, keep)
    for name, keep in FILTERS.items()
    if name not in ("capability", "adapter", "data_policy")
)


def is_plain(context: RoutingContext) -> bool:
    """Whether no SLM lacks what the request needs, whatever its capabilities."""
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
    """Name of the first filter that removes the SLM, "" when it stays.

    `plain` is `is_plain(context)`, which saves the filters that remove nothing then.
    """
    for name, keep in _PINNED if pinned else _PLAIN if plain else _EVERY:
        if not keep(context, spec, state):
            return name
    return ""


def split(
    context: RoutingContext, specs: Mapping[str, SLMSpec], states: Mapping[str, SLMState]
) -> tuple[list[str], list[Candidate]]:
    """Ids that may serve the request, and the others with what excludes them.

    Raises SLMUnavailableError or NoCandidateError when there is nobody, with each SLM's reason.
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
        soft = RELAXED_IF_NOBODY_PASSES
        allowed = [c.slm_id for c in excluded if c.excluded_by == soft]
        excluded = [c for c in excluded if c.excluded_by != soft]
    if not allowed:
        reasons = ", ".join(f"{c.slm_id}: {c.excluded_by}" for c in excluded)
        if all(c.excluded_by in ("available", "breaker") for c in excluded):
            raise SLMUnavailableError(f"no SLM is available ({reasons})")
        raise NoCandidateError(f"no SLM can take this request ({reasons})")
    return allowed, excluded
