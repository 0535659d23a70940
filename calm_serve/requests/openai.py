"""Parse an OpenAI request body and the routing headers; every error names the field.

Only the fields that the decision needs are read. The engine validates the rest of the body and its
errors are passed on, so the router accepts parameters that OpenAI adds later.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calm_serve.errors import RequestError
from calm_serve.types import OutputShape

MAX_OUTPUT_TOKENS = 2**31 - 1
# An hour, the longest time that a deployment may give a request (`router.request_timeout_s`). A
# longer objective can only be a mistake in the unit.
MAX_SLO_S = 3600.0
MAX_SLO_MS = 1000.0 * MAX_SLO_S
# A session id is hashed and a task is kept with its outcome; what is longer is cut, not refused.
MAX_SESSION_CHARS, MAX_TASK_CHARS = 256, 64
VALIDATORS = ("json", "sql", "shell", "label")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OVERRIDES = (
    "x-calm-quality-floor",
    "x-calm-data-policy",
    "x-calm-task",
    "x-calm-validate",
    "x-calm-labels",
    "x-calm-deadline-s",
)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """The fields of a chat or completion body that the decision reads."""

    model: str
    text: str  # roles and contents in the order in which the engine caches prefixes
    last_user: str
    system_chars: int
    turns: int
    stream: bool
    max_output_tokens: int | None
    output_shape: OutputShape
    schema: Mapping[str, Any] | None
    has_image: bool


@dataclass(frozen=True, slots=True)
class Overrides:
    """Constraints and labels from the request's headers."""

    session_id: str = ""
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    deadline_s: float | None = None
    quality_floor: float = 0.0
    local_only: bool = False
    task: str = ""
    validate: str = ""
    labels: tuple[str, ...] = ()


_NO_OVERRIDES = Overrides()


def parse_chat(body: Any) -> ChatRequest:
    """Read a `/v1/chat/completions` body. Raises RequestError naming the parameter.

    >>> parse_chat({"messages": [{"role": "user", "content": "hi"}]}).model
    'auto'
    """
    body = _mapping(body)
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError("'messages' must be a list", param="messages")
    if not messages:
        raise RequestError("'messages' must not be empty", param="messages")
    parts: list[str] = []
    last_user, system_chars, turns, has_image = "", 0, 0, False
    for position, message in enumerate(messages):
        role, text, image = _message(message, position)
        has_image = has_image or image
        parts.append(f"\x02{role}\x03{text}")
        if role == "user":
            last_user, turns = text, turns + 1
        elif role in ("system", "developer"):
            system_chars += len(text)
    return _request(body, "".join(parts), last_user or parts[-1], system_chars, turns, has_image)


def parse_completion(body: Any) -> ChatRequest:
    """Read a `/v1/completions` body. Raises RequestError naming the parameter."""
    body = _mapping(body)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise RequestError("'prompt' must be one string", param="prompt")
    if not prompt:
        raise RequestError("'prompt' must not be empty", param="prompt")
    return _request(body, prompt, prompt, 0, 1, False)


def parse_overrides(headers: Mapping[str, str]) -> Overrides:
    """Read `x-slo-*`, `x-session-id` and `x-calm-*`; names are lower case.

    Raises RequestError for a value out of range and for an unknown `x-calm-` header.
    """
    if not headers:
        return _NO_OVERRIDES
    for name in headers:
        if name.startswith("x-calm-") and name not in _OVERRIDES:
            near = difflib.get_close_matches(name, _OVERRIDES, n=1, cutoff=0.0)[0]
            raise RequestError(f"unknown header {name!r}; the nearest is {near!r}", param=name)
    policy = headers.get("x-calm-data-policy", "any")
    if policy not in ("any", "local"):
        raise RequestError(
            f"x-calm-data-policy must be 'any' or 'local', got {policy!r}",
            param="x-calm-data-policy",
        )
    validate = headers.get("x-calm-validate", "")
    if validate and validate not in VALIDATORS:
        raise RequestError(
            f"x-calm-validate must be one of {', '.join(VALIDATORS)}, got {validate!r}",
            param="x-calm-validate",
        )
    return Overrides(
        session_id=headers.get("x-session-id", "")[:MAX_SESSION_CHARS],
        slo_ttft_ms=_number(headers, "x-slo-ttft-ms", 0.0, MAX_SLO_MS),
        slo_tpot_ms=_number(headers, "x-slo-tpot-ms", 0.0, MAX_SLO_MS),
        deadline_s=_number(headers, "x-calm-deadline-s", 0.0, MAX_SLO_S),
        quality_floor=_number(headers, "x-calm-quality-floor", 0.0, 1.0) or 0.0,
        local_only=policy == "local",
        task=headers.get("x-calm-task", "")[:MAX_TASK_CHARS],
        validate=validate,
        labels=tuple(x.strip() for x in headers.get("x-calm-labels", "").split(",") if x.strip()),
    )


def _request(
    body: Mapping[str, Any],
    text: str,
    last_user: str,
    system_chars: int,
    turns: int,
    has_image: bool,
) -> ChatRequest:
    model = body.get("model", "auto")
    if not isinstance(model, str):
        raise RequestError("'model' must be a string", param="model")
    stream = body.get("stream", False)
    if stream is not None and not isinstance(stream, bool):
        raise RequestError("'stream' must be a boolean", param="stream")
    shape, schema = _output_shape(body)
    return ChatRequest(
        model=model or "auto",
        text=text,
        last_user=last_user,
        system_chars=system_chars,
        turns=turns,
        stream=bool(stream),
        max_output_tokens=_output_limit(body),
        output_shape=shape,
        schema=schema,
        has_image=has_image,
    )


def _output_limit(body: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        limit = body.get(name)
        if limit is None:
            continue
        if type(limit) is not int or not 1 <= limit <= MAX_OUTPUT_TOKENS:
            raise RequestError(f"{name!r} must be a positive integer", param=name)
        return limit
    return None


def _output_shape(body: Mapping[str, Any]) -> tuple[OutputShape, Mapping[str, Any] | None]:
    if body.get("tools") and body.get("tool_choice", "auto") != "none":
        return OutputShape.TOOLS, None
    guided = body.get("structured_outputs")
    if isinstance(guided, Mapping) and any(guided.values()):
        return OutputShape.GUIDED, None
    response_format = body.get("response_format")
    if response_format is None:
        return OutputShape.TEXT, None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "json_object":
        return OutputShape.JSON, None
    if kind == "json_schema":
        schema = response_format.get("json_schema")
        inner = schema.get("schema") if isinstance(schema, Mapping) else None
        return OutputShape.JSON_SCHEMA, inner if isinstance(inner, Mapping) else None
    if kind == "text":
        return OutputShape.TEXT, None
    raise RequestError(
        "'response_format.type' must be text, json_object or json_schema", param="response_format"
    )


def _message(message: Any, position: int) -> tuple[str, str, bool]:
    where = f"messages[{position}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"'{where}' must be an object", param=where)
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(f"'{where}.role' must be one of {', '.join(_ROLES)}", param=where)
    content = message.get("content")
    if content is None:
        if role in ("assistant", "tool", "function"):  # tool calls carry no text
            return role, "", False
        raise RequestError(f"'{where}.content' is missing", param=f"{where}.content")
    if isinstance(content, str):
        return role, content, False
    if not isinstance(content, list):
        raise RequestError(
            f"'{where}.content' must be a string or a list of parts", param=f"{where}.content"
        )
    texts, image = [], False
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "input_image"):
            image = True
        else:
            raise RequestError(
                f"'{where}.content' contains an unsupported part", param=f"{where}.content"
            )
    return role, "\n".join(texts), image


def _mapping(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    return body


def _number(headers: Mapping[str, str], name: str, low: float, high: float) -> float | None:
    raw = headers.get(name)
    if raw is None:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}", param=name)
    return value
