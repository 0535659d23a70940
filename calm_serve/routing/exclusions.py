"""Errors for requests that no SLM can take: what is missing, where, and which key gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from calm_serve.config import SLMSpec
from calm_serve.errors import ContextLengthError, NoCandidateError, SLMUnavailableError
from calm_serve.types import OutputShape, RoutingContext, Task
from calm_serve.upstreams import context_length_message


@dataclass(frozen=True, slots=True)
class Exclusion:
    """What a filter asks of an SLM, in words."""

    needed: str  # after "needs"
    key: str  # of the SLM's entry in the fleet file, which decides it; "" when none does
    field: str = ""  # of the request; "" for its prompt


# By filter; the names are those of `filters.FILTERS`.
_EXCLUSIONS = {
    "other_task": Exclusion("an SLM with this task", "task", "model"),
    "other_space": Exclusion(
        "the vector space of the fleet's first embedding SLM; name another one's SLM",
        "embedding",
        "model",
    ),
    "no_route": Exclusion("an upstream with this route", "remote.routes", "model"),
    "ignored_field": Exclusion("an engine that reads it", ""),
    "no_chat_template": Exclusion("a chat template", "capabilities.chat or engine.chat_template"),
    "no_tools": Exclusion(
        "tool calls", "capabilities.tools, which engine.tool_call_parser turns on", "tools"
    ),
    "no_json_output": Exclusion("structured output", "capabilities.json_output", "response_format"),
    "no_vision": Exclusion("a model that reads images", "capabilities.vision"),
    "no_video": Exclusion("a model that reads videos", "capabilities.video"),
    "no_audio": Exclusion("a model that hears audio", "capabilities.audio"),
    "context_length": Exclusion("a longer context", "context_tokens"),
    "adapter": Exclusion("this adapter", "adapters", "model"),
    "data_policy": Exclusion("a local SLM", "locality", "x-calm-data-policy"),
    "breaker": Exclusion("an SLM that answers", "", "model"),
    "available": Exclusion("a running replica", "scaling.min_replicas", "model"),
}
# The field of the prompt, and of the answer's form, by route; in the others "messages" and
# "response_format".
_PROMPTS = {
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
    "/v1/rerank": "documents",
    "/v1/score": "documents",
    "/tokenize": "prompt",
    "/detokenize": "tokens",
}
_FORMATS = {"/v1/responses": "text.format", "/v1/messages": "output_config.format"}
# What replaces a field that vLLM does not read any more.
_INSTEAD = {"functions": "tools"}
_GUIDED_INSTEAD = "structured_outputs"


def explain_exclusion(
    context: RoutingContext, reasons: Mapping[str, str], specs: Mapping[str, SLMSpec]
) -> NoCandidateError | SLMUnavailableError:
    """Return the error for a request that every SLM is excluded from.

    `reasons` has the name of the filter for each SLM. The error is SLMUnavailableError when an SLM
    could take the request later, and ContextLengthError when a shorter request would do. Its
    parameter is the field of the most frequent reason otherwise.
    """
    # SLMs of other tasks are no news, unless there are no others.
    relevant = {slm: why for slm, why in reasons.items() if why != "other_task"} or dict(reasons)
    by_reason: dict[str, list[str]] = {}
    for slm, why in relevant.items():
        by_reason.setdefault(why, []).append(slm)
    details = "; ".join(
        f"{', '.join(slms)}: {why} ({_words(context, why)})" for why, slms in by_reason.items()
    )
    if any(why in ("available", "breaker") for why in reasons.values()):
        return SLMUnavailableError(f"no SLM is available ({details})")
    message = f"no SLM can take this request: {details}"
    if "context_length" in by_reason:
        # Those SLMs have whatever else it needs: the filter comes after task and capabilities.
        limit = max(specs[slm].context_tokens for slm in by_reason["context_length"])
        return _too_long(context, limit, message)
    frequent = max(by_reason, key=lambda why: len(by_reason[why]))
    return NoCandidateError(message, param=_field(context, frequent))


def explain_pinned(
    context: RoutingContext, spec: SLMSpec, why: str
) -> NoCandidateError | SLMUnavailableError:
    """Return the error for a request to one SLM, which the filter `why` excludes."""
    if why == "available":
        return SLMUnavailableError(f"SLM {spec.id!r} has no running replica")
    message = f"SLM {spec.id!r} cannot take this request: {why} ({_words(context, why)})"
    if why == "context_length":
        return _too_long(context, spec.context_tokens, message)
    return NoCandidateError(message, param=_field(context, why))


def _too_long(context: RoutingContext, limit_tokens: int, details: str) -> ContextLengthError:
    """Return the error that clients know an engine's by; the prompt's tokens are estimated."""
    prompt = 0 if context.truncates_prompt else context.sequence_tokens or context.prompt_tokens
    requested = prompt + (context.max_output_tokens or 0)
    sentence = context_length_message(limit_tokens, requested)
    return ContextLengthError(f"{sentence} ({details})", param=_field(context, "context_length"))


def _words(context: RoutingContext, why: str) -> str:
    exclusion = _EXCLUSIONS[why]
    field = _field(context, why)
    if why == "ignored_field":
        instead = _INSTEAD.get(field, _GUIDED_INSTEAD)
        return f"vLLM does not read {field!r} any more; use {instead!r}"
    needed = f"task {context.task}" if why == "other_task" else exclusion.needed
    key = f"; key: {exclusion.key}" if exclusion.key else ""
    return f"{field!r} needs {needed}{key}"


def _field(context: RoutingContext, why: str) -> str:
    if why == "ignored_field":
        return context.ignored_fields[0]
    if why == "no_tools" and "functions" in context.ignored_fields:
        return "functions"
    if why == "no_json_output":
        guided = context.output_shape is OutputShape.GUIDED
        return _FORMATS.get(context.route, _GUIDED_INSTEAD if guided else "response_format")
    if why == "other_task" and context.task is not Task.GENERATE:
        return "model"
    return _EXCLUSIONS[why].field or _PROMPTS.get(context.route, "messages")
