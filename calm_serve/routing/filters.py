"""Hard filters: they exclude candidates and are never relaxed, except the language filter.

A filter returns True when the SLM may serve the request. Their order decides only which filter's
name the explanation shows. `exclusions` words the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from calm_serve.config import SLMSpec
from calm_serve.routing.exclusions import explain_exclusion
from calm_serve.types import Candidate, RoutingContext, SLMState, Task

Filter = Callable[[RoutingContext, SLMSpec, SLMState], bool]

# A prompt is too long when its estimated tokens divided by this exceed the context. The engine
# counts exactly and answers 400 when the estimate was too low.
ESTIMATE_TOLERANCE = 2.0
# From this probability on, a language excludes the SLMs that do not list it; below, it only lowers
# their quality (`scoring.language_factor`). None of 4,000 English prompts was of another language
# at it, and three quarters of 84 sentences in 14 other languages were.
CERTAIN_LANGUAGE_RATIO = 0.75


def fits_context(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """Prompt and requested output fit the SLM's context."""
    del state
    tokens = float(context.max_output_tokens or 0)
    if not context.truncates_prompt:
        prompt = context.sequence_tokens or context.prompt_tokens
        tokens += prompt if context.is_token_ids else prompt / ESTIMATE_TOLERANCE
    return tokens <= spec.context_tokens


def has_task(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """The SLM has the request's task. Embedding SLMs score too, for clients that name them."""
    del state
    if spec.task is context.task or context.task is Task.ANY:
        return True
    scores = context.task is Task.RERANK and spec.task is Task.EMBED
    return scores and context.slm_id == spec.id


def shares_space(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """The SLM's vectors can be compared with those that `auto` answers."""
    del state
    return not context.embedding_space or spec.embedding_space == context.embedding_space


def serves_route(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """An upstream has the route; vLLM has them all."""
    del state
    return spec.remote is None or not context.route or context.route in spec.remote.routes


def reads_fields(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """No field of the request is one that vLLM passes over; an upstream may read it."""
    del state
    return not context.ignored_fields or spec.remote is not None


def _has(capability: str) -> Filter:
    def keep(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
        del state
        return capability not in context.needs or bool(getattr(spec.capabilities, capability))

    return keep


def has_adapter(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """The SLM has the adapter that the client named."""
    del state
    return not context.adapter or any(a.name == context.adapter for a in spec.adapters)


def speaks_language(context: RoutingContext, spec: SLMSpec, state: SLMState) -> bool:
    """The SLM lists the prompt's language, or lists none, or the language is not certain."""
    del state
    if context.language_ratio < CERTAIN_LANGUAGE_RATIO or not spec.languages:
        return True
    return context.language in spec.languages


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


# Filter of each capability.
CAPABILITY_FILTERS = {
    "no_chat_template": "chat",
    "no_tools": "tools",
    "no_json_output": "json_output",
    "no_vision": "vision",
    "no_video": "video",
    "no_audio": "audio",
}
FILTERS: dict[str, Filter] = {
    "other_task": has_task,
    "other_space": shares_space,
    "no_route": serves_route,
    "ignored_field": reads_fields,
    **{name: _has(capability) for name, capability in CAPABILITY_FILTERS.items()},
    "context_length": fits_context,
    "adapter": has_adapter,
    "data_policy": obeys_data_policy,
    "breaker": is_healthy,
    "available": is_available,
    "language": speaks_language,  # last: an SLM excluded by it passed everything else
}
# When no SLM passes, those that only this filter excluded are tried: a poor answer beats none.
RELAXED_IF_NONE_PASSES = "language"
# What can change without the request: one of these is a reason to try again later.
PASSING = ("breaker", "available")
# Filters of a pinned request: the language and the circuit breaker do not count, because the client
# chose the SLM; what the SLM cannot do, and the data policy, still exclude it.
PINNED_FILTERS = tuple(name for name in FILTERS if name not in ("breaker", "language"))
_EVERY = tuple(FILTERS.items())
_PINNED = tuple((name, FILTERS[name]) for name in PINNED_FILTERS)
# Filters of a plain request (see `is_plain`), which is most of them.
_PLAIN_NAMES = (
    "other_task",
    "no_route",
    "no_chat_template",
    "context_length",
    *PASSING,
    "language",
)
_PLAIN = tuple((name, FILTERS[name]) for name in _PLAIN_NAMES)
_PLAIN_NEEDS = ((), ("chat",))


def is_plain(context: RoutingContext) -> bool:
    """Return whether the request needs no capability but chat, no adapter and no data policy."""
    return not (
        context.needs not in _PLAIN_NEEDS
        or context.local_only
        or context.adapter
        or context.ignored_fields
        or context.embedding_space
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
        raise explain_exclusion(context, {c.slm_id: c.excluded_by for c in excluded}, specs)
    return allowed, excluded
