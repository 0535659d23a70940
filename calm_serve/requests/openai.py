"""Parse OpenAI's chat and text completions; every error names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calm_serve.requests.parsed import (
    ParsedRequest,
    Prompts,
    check_schema,
    check_stops,
    needs,
    prefix_seed,
    read_choices,
    read_format,
    read_model,
    read_object,
    read_output_limit,
    read_prompts,
    read_stream,
    read_tools,
    read_truncation,
)
from calm_serve.requests.transcript import Transcript, read_messages
from calm_serve.types import OutputShape

# vLLM's and OpenAI's limit of a text completion that names none.
DEFAULT_COMPLETION_TOKENS = 16
# Fields that vLLM had before `structured_outputs`, and OpenAI before `tools`. vLLM passes over
# them, so its answer would not be as asked; other upstreams may still read them.
_OLD_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_OLD_TOOLS = "functions"
_EMBEDS_CHARS = 8192  # of encoded prompts, for the prefix chain


def parse_chat(body: Any) -> ParsedRequest:
    """Read a `/v1/chat/completions` body. Raises RequestError naming the parameter.

    >>> parse_chat({"messages": [{"role": "user", "content": "hi"}]}).model
    'auto'
    """
    body = read_object(body)
    transcript = Transcript()
    read_messages(body, transcript)
    tools = read_tools(body)
    choice = _tool_choice(body, tools)
    shape, schema, ignored = _constraints(body)
    if choice != "none" and not tools:
        ignored = (*ignored, _OLD_TOOLS)
    return ParsedRequest(
        **transcript.fields(),
        route="/v1/chat/completions",
        model=read_model(body),
        stream=read_stream(body),
        max_output_tokens=read_output_limit(body, "max_completion_tokens", "max_tokens"),
        output_shape=shape if choice == "none" else OutputShape.TOOLS,
        schema=schema,
        needs=transcript.needs(tools=choice != "none", json_output=shape is not OutputShape.TEXT),
        tool_choice=choice,
        choices=read_choices(body),
        truncate_tokens=read_truncation(body),
        prefix_seed=prefix_seed(body, tools),
        ignored_fields=ignored,
    )


def parse_completion(body: Any) -> ParsedRequest:
    """Read a `/v1/completions` body. Raises RequestError naming the parameter."""
    body = read_object(body)
    prompts = _prompts(body)
    shape, schema, ignored = _constraints(body)
    limit = read_output_limit(body, "max_tokens", least=0)
    return ParsedRequest(
        **prompts.fields(),
        route="/v1/completions",
        model=read_model(body),
        stream=read_stream(body),
        max_output_tokens=DEFAULT_COMPLETION_TOKENS if limit is None else limit,
        output_shape=shape,
        schema=schema,
        needs=needs(json_output=shape is not OutputShape.TEXT),
        choices=read_choices(body) * prompts.count,
        truncate_tokens=read_truncation(body),
        prefix_seed=prefix_seed(body),
        ignored_fields=ignored,
    )


def _prompts(body: Mapping[str, Any]) -> Prompts:
    prompt, embeds = body.get("prompt"), body.get("prompt_embeds")
    if embeds and (prompt is None or prompt in ("", [])):
        # Only vLLM takes them, where the operator allows it: as text, encoded in base64.
        several = embeds if isinstance(embeds, list) else [embeds]
        return Prompts("", len(several), is_token_ids=True, prefix=str(several[0])[:_EMBEDS_CHARS])
    return read_prompts(prompt, "prompt")


def _tool_choice(body: Mapping[str, Any], tools: list[Any]) -> str:
    if tools:
        choice = body.get("tool_choice")
    elif read_tools(body, _OLD_TOOLS):
        choice = body.get("function_call")
    else:
        return "none"
    if choice is None:
        return "auto"
    if isinstance(choice, Mapping):
        return "named"
    return choice if choice in ("none", "required") else "auto"


def _constraints(
    body: Mapping[str, Any],
) -> tuple[OutputShape, Mapping[str, Any] | None, tuple[str, ...]]:
    """Return shape and schema that the answer must have, and old fields that state one."""
    check_stops(body)
    shape, schema = read_format(body.get("response_format"), "response_format")
    old = tuple(name for name in _OLD_GUIDED if body.get(name))
    guided = body.get("structured_outputs")
    if isinstance(guided, Mapping) and any(guided.values()):
        check_schema(guided.get("json"), "structured_outputs")
        return OutputShape.GUIDED, None, old
    if old and shape is OutputShape.TEXT:
        check_schema(body.get("guided_json"), "guided_json")
        return OutputShape.GUIDED, None, old
    return shape, schema, old
