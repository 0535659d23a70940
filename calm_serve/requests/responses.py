"""Parse OpenAI's Responses, for a service that keeps no responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calm_serve.errors import RequestError
from calm_serve.requests.parsed import (
    ParsedRequest,
    check_schema,
    check_stops,
    prefix_seed,
    read_format,
    read_model,
    read_object,
    read_output_limit,
    read_stream,
    read_tools,
)
from calm_serve.requests.transcript import Transcript, check_messages, role_word
from calm_serve.types import OutputShape

# Fields that refer to what an earlier request left behind.
_STORED = ("previous_response_id", "conversation")
_STATELESS = "this service keeps no responses: send the whole conversation in 'input'"


def parse_responses(body: Any) -> ParsedRequest:
    """Read a `/v1/responses` body. Raises RequestError naming the parameter.

    `store` is accepted, because it is true unless a client says otherwise, but a response cannot be
    retrieved later. What cannot work without stored responses is refused.
    """
    body = read_object(body)
    for name in _STORED:
        if body.get(name) is not None:
            raise RequestError(f"{name!r} is not supported: {_STATELESS}", param=name)
    if body.get("background"):
        raise RequestError(
            "'background' is not supported: this service keeps no responses that could be fetched "
            "later; use 'stream'",
            param="background",
        )
    transcript = _transcript(body)
    tools = read_tools(body)
    choice = _tool_choice(body, tools)
    shape, schema = _format(body)
    return ParsedRequest(
        **transcript.fields("input"),
        route="/v1/responses",
        model=read_model(body),
        stream=read_stream(body),
        max_output_tokens=read_output_limit(body, "max_output_tokens"),
        output_shape=shape if choice == "none" else OutputShape.TOOLS,
        schema=schema,
        needs=transcript.needs(tools=choice != "none", json_output=shape is not OutputShape.TEXT),
        tool_choice=choice,
        truncate_tokens=-1 if body.get("truncation") == "auto" else None,
        prefix_seed=prefix_seed(body, tools),
    )


def _transcript(body: Mapping[str, Any]) -> Transcript:
    transcript = Transcript()
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise RequestError("'instructions' must be a string", param="instructions")
    items = body.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if items is None:
        raise RequestError("'input' is missing", param="input")
    if instructions:
        transcript.add("system", instructions)
    for position, item in enumerate(check_messages(items, "input")):
        _read_item(item, transcript, f"input[{position}]")
    return transcript


def _read_item(item: Any, transcript: Transcript, where: str) -> None:
    if not isinstance(item, Mapping):
        raise RequestError(f"'{where}' must be an object", param=where)
    kind = item.get("type")
    if kind == "item_reference":
        raise RequestError(f"'{where}' is a reference: {_STATELESS}", param=where)
    role = item.get("role")
    if isinstance(role, str) and role:
        content = transcript.read_content(item.get("content"), f"{where}.content")
        transcript.add(role_word(role), content)
    elif kind in ("function_call", "custom_tool_call"):
        arguments = item.get("arguments") or item.get("input") or ""
        transcript.add("assistant", f"\n{item.get('name', '')} {arguments}")
    elif kind in ("function_call_output", "custom_tool_call_output"):
        text = transcript.read_content(item.get("output"), f"{where}.output")
        transcript.add("tool", text)
    else:  # reasoning, of which templates drop most, and what only built-in tools know
        transcript.add("assistant", "")


def _tool_choice(body: Mapping[str, Any], tools: list[Any]) -> str:
    choice = body.get("tool_choice")
    if not tools:
        return "none"
    if isinstance(choice, Mapping):
        return "named"
    return choice if isinstance(choice, str) and choice in ("none", "required") else "auto"


def _format(body: Mapping[str, Any]) -> tuple[OutputShape, Mapping[str, Any] | None]:
    check_stops(body)
    guided = body.get("structured_outputs")
    if isinstance(guided, Mapping) and any(guided.values()):
        check_schema(guided.get("json"), "structured_outputs")
        return OutputShape.GUIDED, None
    text = body.get("text")
    return read_format(text.get("format") if isinstance(text, Mapping) else None, "text.format")
