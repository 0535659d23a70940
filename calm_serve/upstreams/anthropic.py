"""Anthropic's dialect: chat completions as `/v1/messages`, and its answers as chat completions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from calm_serve.upstreams.events import Event
from calm_serve.upstreams.failures import Failure, FailureKind, UpstreamError, unsupported
from calm_serve.upstreams.fields import MEANINGFUL, names, refuse_meaningful
from calm_serve.upstreams.kinds import DONE, Document, parse_object
from calm_serve.upstreams.usage import Usage, usage_of

# The API demands a limit. This is what its smallest models allow, and far above an SLM's answer.
DEFAULT_MAX_TOKENS = 4096
MAX_BLOCKS = 1024  # of an answer; the most tool calls seen in one are dozens
# Fields of chat completions for which the API has nothing and whose absence changes the answer.
_LACKING = MEANINGFUL | names(
    "logprobs top_logprobs logit_bias functions function_call audio web_search_options"
)
_TAKEN = names(
    """model messages stream stream_options max_tokens max_completion_tokens temperature top_p top_k
    stop tools tool_choice parallel_tool_calls response_format n"""
)
_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def messages_body(body: Mapping[str, Any], slm_id: str) -> tuple[dict[str, Any], list[str]]:
    """Return a chat body as one of `/v1/messages`, and the names of dropped fields.

    Raises UpstreamError for what the API lacks, or for a body that nobody can take.
    """
    dropped = [name for name in body if name not in _TAKEN]
    refuse_meaningful(body, dropped, slm_id, _LACKING)
    if body.get("n") not in (None, 1):
        raise unsupported(slm_id, "n")
    system, messages = _conversation(body.get("messages"), slm_id)
    sent: dict[str, Any] = {"model": body["model"], "max_tokens": _limit(body, slm_id)}
    if system:
        sent["system"] = system
    sent["messages"] = messages
    for name in ("stream", "top_k"):
        if body.get(name) is not None:
            sent[name] = body[name]
    _sampling(body, sent, dropped)
    if stop := body.get("stop"):
        sent["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    _tools(body, sent, slm_id)
    _shape(body, sent, slm_id)
    return sent, dropped


def chat_answer(document: Document, created_s: int) -> dict[str, Any]:
    """Return an answer of `/v1/messages` as one of chat completions.

    Args:
        document: a whole answer that is no error.
        created_s: Unix seconds.
    """
    texts, thoughts, calls = [], [], []
    blocks = document.get("content")
    for block in _list(blocks):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            texts.append(str(block.get("text") or ""))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            calls.append(_call(block, json.dumps(block.get("input") or {}, ensure_ascii=False)))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None}
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    finish = _FINISH_REASONS.get(str(document.get("stop_reason")), "stop")
    return {
        "id": _id(document),
        "object": "chat.completion",
        "created": created_s,
        "model": str(document.get("model") or ""),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": _usage(usage_of(document) or Usage()),
    }


class ChatStream:
    """Turns a stream of `/v1/messages` into one of chat completions, event by event."""

    __slots__ = ("_calls", "_created_s", "_ended", "_head", "_include_usage", "_silent", "_usage")

    def __init__(self, created_s: int, *, include_usage: bool) -> None:
        """Create a translator. `include_usage`: the client asked for an event with usage."""
        self._created_s = created_s
        self._include_usage = include_usage
        self._head: dict[str, Any] = {}
        self._calls: dict[int, int] = {}  # index of a block to the position of its tool call
        self._silent: set[int] = set()  # blocks of tool calls without arguments so far
        self._usage = Usage()
        self._ended = False

    def translate(self, event: Event) -> bytes:
        """Return the chat events that an event becomes; none for an error, which ends a stream."""
        document = parse_object(event.data) if event.data is not None else None
        kind = document.get("type") if document is not None else "ping"
        if self._ended:
            return b""
        if document is None or kind == "ping":
            return b": ping\n\n" if event.data is None or kind == "ping" else b""
        if usage := usage_of(document):
            self._usage = self._usage.merged(usage)
        if kind == "message_start":
            return self._start(document)
        index, part = _index(document), document.get("delta") or document.get("content_block")
        part = part if isinstance(part, Mapping) else {}
        if kind == "content_block_start":
            return self._block(index, part)
        if kind == "content_block_delta":
            return self._delta(index, part)
        if kind == "content_block_stop" and index in self._silent:
            # A call without arguments; clients parse what they get.
            return self._arguments(index, "{}")
        if kind == "message_delta" and (reason := part.get("stop_reason")):
            return self._chunk({}, _FINISH_REASONS.get(str(reason), "stop"))
        return self.end() if kind == "message_stop" else b""

    def end(self) -> bytes:
        """Return the events at the end of a whole stream; nothing once they were returned."""
        if self._ended:
            return b""
        self._ended = True
        last = b""
        if self._include_usage:
            last = _event({**self._head, "choices": [], "usage": _usage(self._usage)})
        return last + b"data: " + DONE + b"\n\n"

    def _start(self, document: Document) -> bytes:
        message = document.get("message")
        message = message if isinstance(message, Mapping) else {}
        self._head = {
            "id": _id(message),
            "object": "chat.completion.chunk",
            "created": self._created_s,
            "model": str(message.get("model") or ""),
        }
        return self._chunk({"role": "assistant", "content": ""})

    def _block(self, index: int, block: Document) -> bytes:
        if block.get("type") != "tool_use" or index < 0:
            return self._delta(index, block)
        position = self._calls.setdefault(index, len(self._calls))
        self._silent.add(index)
        return self._chunk({"tool_calls": [{"index": position, **_call(block, "")}]})

    def _delta(self, index: int, delta: Document) -> bytes:
        if text := delta.get("text"):
            return self._chunk({"content": str(text)})
        if thinking := delta.get("thinking"):
            return self._chunk({"reasoning": str(thinking)})
        part = delta.get("partial_json")
        return self._arguments(index, str(part)) if part and index in self._calls else b""

    def _arguments(self, index: int, part: str) -> bytes:
        self._silent.discard(index)
        call = {"index": self._calls[index], "function": {"arguments": part}}
        return self._chunk({"tool_calls": [call]})

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event({**self._head, "choices": [choice]})


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _call_id(call_id: Any) -> str:
    """Return an id in the characters that the API takes; other servers' ids have others."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", str(call_id or ""))


def _event(document: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def _index(document: Document) -> int:
    """Return a block's index; -1 for what cannot be one, so that no upstream grows our tables."""
    index = document.get("index")
    return index if type(index) is int and 0 <= index < MAX_BLOCKS else -1


def _id(message: Document) -> str:
    return str(message.get("id") or "")[:128]


def _call(block: Document, arguments: str) -> dict[str, Any]:
    function = {"name": block.get("name"), "arguments": arguments}
    return {"id": block.get("id"), "type": "function", "function": function}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _invalid(message: str, param: str) -> UpstreamError:
    return UpstreamError(Failure(FailureKind.INVALID_REQUEST, message, param=param))


def _limit(body: Mapping[str, Any], slm_id: str) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        limit = body.get(name)
        if type(limit) is int and limit == 0:
            raise unsupported(slm_id, name)
        if limit is not None:
            if type(limit) is not int:
                raise _invalid(f"{name!r} must be a positive integer", name)
            return limit
    return DEFAULT_MAX_TOKENS


def _sampling(body: Mapping[str, Any], sent: dict[str, Any], dropped: list[str]) -> None:
    """Pass on one of temperature and top_p: newer models refuse both together."""
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is not None:
        high = isinstance(temperature, int | float) and temperature > 1
        sent["temperature"] = 1.0 if high else temperature  # OpenAI's goes up to 2
        dropped += ["top_p"] if top_p is not None else []
    elif top_p is not None:
        sent["top_p"] = top_p


def _conversation(messages: Any, slm_id: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the system's blocks, and the turns: user and assistant by turns, never empty."""
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for position, message in enumerate(_list(messages)):
        where = f"messages[{position}]"
        if not isinstance(message, Mapping):
            raise _invalid(f"{where!r} must be an object", where)
        role = message.get("role")
        if role in ("system", "developer"):
            system += _blocks(message.get("content"), f"{where}.content", slm_id)
            continue
        if role == "tool":
            role, blocks = "user", [_tool_result(message, where, slm_id)]
        elif role == "assistant":
            blocks = _assistant(message, where, slm_id)
        elif role == "user":
            blocks = _blocks(message.get("content"), f"{where}.content", slm_id)
        else:
            raise unsupported(slm_id, f"{where}.role")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    if not turns:
        raise _invalid("'messages' must have a message that is not empty", "messages")
    if turns[-1]["role"] == "assistant" and turns[-1]["content"][-1]["type"] == "text":
        last = turns[-1]["content"][-1]
        last["text"] = last["text"].rstrip() or "..."  # blanks at the end are refused
    return system, turns


def _blocks(content: Any, where: str, slm_id: str) -> list[dict[str, Any]]:
    """Return content as blocks; empty text, which is refused, is left out."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise _invalid(f"{where!r} must be a string or a list of parts", where)
    blocks = []
    for position, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") or part.get("refusal") if isinstance(part, Mapping) else None
        if kind in ("text", "refusal", "input_text", "output_text"):
            blocks += [{"type": "text", "text": text}] if text else []
        elif kind == "image_url":
            blocks.append(_image(part.get("image_url"), f"{where}[{position}]"))
        else:
            raise unsupported(slm_id, f"{where}[{position}].type")
    return blocks


def _image(image: Any, where: str) -> dict[str, Any]:
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, str):
        raise _invalid(f"'{where}.image_url.url' must be a string", f"{where}.image_url.url")
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, comma, data = url[len("data:") :].partition(";base64,")
    if not comma:
        raise _invalid(f"'{where}.image_url.url' must be base64 data", f"{where}.image_url.url")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def _assistant(message: Mapping[str, Any], where: str, slm_id: str) -> list[dict[str, Any]]:
    blocks = _blocks(message.get("content"), f"{where}.content", slm_id)
    for position, call in enumerate(_list(message.get("tool_calls"))):
        path = f"{where}.tool_calls[{position}].function"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise unsupported(slm_id, path)
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (ValueError, TypeError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise _invalid(f"'{path}.arguments' must be a JSON object", f"{path}.arguments")
        blocks.append(
            {
                "type": "tool_use",
                "id": _call_id(call.get("id")),
                "name": function.get("name"),
                "input": arguments,
            }
        )
    return blocks


def _tool_result(message: Mapping[str, Any], where: str, slm_id: str) -> dict[str, Any]:
    result: dict[str, Any] = {"type": "tool_result"}
    result["tool_use_id"] = _call_id(message.get("tool_call_id"))
    if content := _blocks(message.get("content"), f"{where}.content", slm_id):
        result["content"] = content
    return result


def _tools(body: Mapping[str, Any], sent: dict[str, Any], slm_id: str) -> None:
    tools = []
    for position, tool in enumerate(_list(body.get("tools"))):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise unsupported(slm_id, f"tools[{position}].type")
        one = {"name": function.get("name")}
        if function.get("description"):
            one["description"] = function["description"]
        one["input_schema"] = function.get("parameters") or {"type": "object", "properties": {}}
        tools.append(one)
    if not tools:
        return
    sent["tools"] = tools
    choice = _tool_choice(body.get("tool_choice"), slm_id)
    if body.get("parallel_tool_calls") is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    if choice != {"type": "auto"}:
        sent["tool_choice"] = choice


def _tool_choice(choice: Any, slm_id: str) -> dict[str, Any]:
    kinds = {None: "auto", "auto": "auto", "required": "any", "none": "none"}
    if choice is None or (isinstance(choice, str) and choice in kinds):
        return {"type": kinds[choice]}
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(function, Mapping):
        raise unsupported(slm_id, "tool_choice")
    return {"type": "tool", "name": function.get("name")}


def _shape(body: Mapping[str, Any], sent: dict[str, Any], slm_id: str) -> None:
    shape = body.get("response_format")
    kind = shape.get("type") if isinstance(shape, Mapping) else "text"
    if kind == "text":
        return
    named = shape.get("json_schema") if isinstance(shape, Mapping) else None
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        raise unsupported(slm_id, "response_format")  # JSON without a schema cannot be asked for
    sent["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
