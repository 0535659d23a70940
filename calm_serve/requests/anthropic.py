"""Parse Anthropic's Messages; every error names the field, in the message too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calm_serve.errors import RequestError
from calm_serve.requests.parsed import (
    ParsedRequest,
    check_stops,
    prefix_seed,
    read_format,
    read_model,
    read_object,
    read_output_limit,
    read_stream,
    read_tools,
)
from calm_serve.requests.transcript import (
    BILLING_HEADER,
    Transcript,
    check_messages,
    role_word,
)
from calm_serve.types import OutputShape


def parse_messages(body: Any) -> ParsedRequest:
    """Read a `/v1/messages` body. Raises RequestError naming the parameter.

    >>> body = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    >>> parse_messages(body).max_output_tokens
    5
    """
    body = read_object(body)
    transcript, tools = _transcript(body), read_tools(body)
    limit = read_output_limit(body, "max_tokens")
    if limit is None:
        raise RequestError("'max_tokens' is missing", param="max_tokens")
    check_stops(body, "stop_sequences")
    choice = _tool_choice(body, tools)
    shape, schema = _format(body)
    return ParsedRequest(
        **transcript.fields(),
        route="/v1/messages",
        model=read_model(body),
        stream=read_stream(body),
        max_output_tokens=limit,
        output_shape=shape if choice == "none" else OutputShape.TOOLS,
        schema=schema,
        needs=transcript.needs(tools=choice != "none", json_output=shape is not OutputShape.TEXT),
        tool_choice=choice,
        prefix_seed=prefix_seed(body, tools),
    )


def parse_count_tokens(body: Any) -> ParsedRequest:
    """Read a `/v1/messages/count_tokens` body. Raises RequestError naming the parameter."""
    body = read_object(body)
    transcript, tools = _transcript(body), read_tools(body)
    return ParsedRequest(
        **transcript.fields(),
        route="/v1/messages/count_tokens",
        tokenizer_only=True,
        model=read_model(body),
        max_output_tokens=0,
        needs=transcript.needs(),
        truncate_tokens=-1,  # a prompt of any length is counted
        prefix_seed=prefix_seed(body, tools),
    )


def _transcript(body: Mapping[str, Any]) -> Transcript:
    transcript = Transcript()
    if system := _system_text(body.get("system"), "system"):
        transcript.add("system", system)
    messages = check_messages(body.get("messages"), "messages")
    for position, message in enumerate(messages):
        _read_message(message, transcript, f"messages[{position}]")
    return transcript


def _system_text(system: Any, where: str) -> str:
    """Return the system prompt as vLLM joins it, without Claude Code's billing header."""
    if system is None:
        return ""
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system
    if not isinstance(blocks, list):
        raise RequestError(f"'{where}' must be a string or a list of blocks", param=where)
    texts = (block.get("text") for block in blocks if isinstance(block, Mapping))
    return "".join(
        text for text in texts if isinstance(text, str) and not text.startswith(BILLING_HEADER)
    )


def _read_message(message: Any, transcript: Transcript, where: str) -> None:
    if not isinstance(message, Mapping):
        raise RequestError(f"'{where}' must be an object", param=where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"'{where}.role' must be a string", param=where)
    if role == "system":
        transcript.add(role, _system_text(content, f"{where}.content"))
        return
    if isinstance(content, str):
        transcript.add(role_word(role), content)
        return
    if not isinstance(content, list):
        raise RequestError(
            f"'{where}.content' must be a string or a list of blocks", param=f"{where}.content"
        )
    texts = []
    for block in content:
        if not isinstance(block, Mapping):
            raise RequestError(
                f"'{where}.content' contains a block that is no object", param=f"{where}.content"
            )
        if (text := _read_block(block, role, transcript, f"{where}.content")) is not None:
            texts.append(text)
    # vLLM turns results of tools into messages of their own, before the rest of the message.
    if texts or role != "user":
        results = role == "user" and any(block.get("type") == "tool_result" for block in content)
        transcript.add(role_word(role), "\n".join(texts), with_tool_results=results)


def _read_block(
    block: Mapping[str, Any], role: str, transcript: Transcript, where: str
) -> str | None:
    """Return what the block adds to its message's text; None when it adds nothing."""
    kind = block.get("type")
    if kind == "text":
        text = block.get("text")
        return text if isinstance(text, str) and text else None
    if kind == "image":
        transcript.note_media(kind)
        return ""
    if kind == "tool_use":
        return f"{block.get('name', '')} {block.get('input', '')}"
    if kind == "tool_result":
        text = transcript.read_content(block.get("content"), where)
        if role != "user":
            return text
        transcript.add("tool", text)
    return None  # thinking, of which templates drop most, and what vLLM adds later


def _tool_choice(body: Mapping[str, Any], tools: list[Any]) -> str:
    choice = body.get("tool_choice")
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if not tools or kind == "none":
        return "none"
    return {"any": "required", "tool": "named"}.get(str(kind), "auto")


def _format(body: Mapping[str, Any]) -> tuple[OutputShape, Mapping[str, Any] | None]:
    config = body.get("output_config")
    wanted = config.get("format") if isinstance(config, Mapping) else None
    return read_format(wanted, "output_config.format")
