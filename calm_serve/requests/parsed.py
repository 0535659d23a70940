"""The record that every parser returns, and what the bodies of all routes have in common.

Only the fields that the decision needs are read. The engine validates the rest of the body and its
errors are passed on, so the router accepts what OpenAI, Anthropic or vLLM add later. Where a field
is read, the parser is not stricter than vLLM, except that counts are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from pydantic_core import to_json

from calm_serve.errors import RequestError
from calm_serve.types import OutputShape, Task

START, ROLE_END = "\x02", "\x03"  # `\x02role\x03` starts a message in the text of a chat
MAX_OUTPUT_TOKENS = 2**31 - 1
MAX_CHOICES = 128  # OpenAI's limit of `n`
MAX_STOPS = 64  # OpenAI and vLLM accept 4; vLLM's limit can be raised
MAX_TOOLS = 512  # OpenAI accepts 128
MAX_PROMPTS = 16_384  # OpenAI accepts 2,048 texts to embed, vLLM 1,024 prompts to complete
MAX_MODEL_CHARS = 256  # it is repeated in the error for an unknown model
MAX_SCHEMA_NODES = 10_000  # vLLM compiles a schema to a grammar before the first token
MAX_SCHEMA_DEPTH = 64  # vLLM's own limit
_MAX_DIGITS = 10  # of MAX_OUTPUT_TOKENS
_MAX_REF_CHARS = 512
_MAX_REFS, _REFERENCE_ROUNDS = 1000, 16  # what takes longer is left to the engine
# Ids of a prompt of token ids that the prefix chain reads; see `context.prefix_chain`.
_PREFIX_IDS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """The fields of a body that the decision reads."""

    route: str  # the engine's, such as "/v1/chat/completions"
    task: Task = Task.GENERATE
    tokenizer_only: bool = False  # the tokenizer answers; the model does not run
    model: str = "auto"
    text: str = ""  # roles and contents in the order in which the engine caches prefixes
    last_user: str = ""
    followed_user: str = ""  # the user's message that `last_user` only continues, "" for none
    parent_key: int = 0  # of the conversation up to the last answer; 0 before the first one
    conversation_key: int = 0  # the `parent_key` of the next turn
    history_chars: int = 0  # up to the end of the last answer
    ends_in_tool_results: bool = False
    system_chars: int = 0
    turns: int = 1
    stream: bool = False
    max_output_tokens: int | None = None
    output_shape: OutputShape = OutputShape.TEXT
    schema: Mapping[str, Any] | None = None
    needs: tuple[str, ...] = ()  # fields of `Capabilities` that an SLM must have, sorted
    tool_choice: str = "none"  # "auto", "required", "named", or "none" without usable tools
    choices: int = 1  # answers that the engine computes: `n` for each prompt
    is_token_ids: bool = False  # the prompt has no text, so `text` is empty
    input_tokens: int | None = None  # all sequences together; None unless known exactly
    sequence_chars: int | None = None  # of the longest of several sequences
    sequence_tokens: int | None = None  # the same in tokens, where they are known
    truncate_tokens: int | None = None  # the engine cuts each prompt to these; -1: to the context
    prefix: str = ""  # what the prefix chain is made of, where it is not `text`
    prefix_seed: int = 0  # of what the engine puts before the text: tools, a cache salt
    ignored_fields: tuple[str, ...] = ()  # fields of earlier APIs that vLLM passes over silently

    @property
    def wants_tools(self) -> bool:
        """Whether the answer may be a tool call."""
        return self.tool_choice != "none"


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of a body: texts, or token ids."""

    text: str
    count: int
    is_token_ids: bool = False
    input_tokens: int | None = None
    sequence_chars: int | None = None
    sequence_tokens: int | None = None
    prefix: str = ""

    def fields(self) -> dict[str, Any]:
        """The fields of a ParsedRequest that the prompts determine."""
        return {
            "text": self.text,
            "last_user": self.text,
            "is_token_ids": self.is_token_ids,
            "input_tokens": self.input_tokens,
            "sequence_chars": self.sequence_chars,
            "sequence_tokens": self.sequence_tokens,
            "prefix": self.prefix,
        }


def read_object(body: Any) -> Mapping[str, Any]:
    """Return the body. Raises RequestError unless it is a JSON object."""
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    return body


def read_model(body: Mapping[str, Any]) -> str:
    """Return the field `model`, "auto" when it is missing, null or empty."""
    model = body.get("model")
    if model is None:
        return "auto"
    if not isinstance(model, str):
        raise RequestError("'model' must be a string", param="model")
    if len(model) > MAX_MODEL_CHARS:
        raise RequestError(f"'model' is longer than {MAX_MODEL_CHARS} characters", param="model")
    return model or "auto"


def read_stream(body: Mapping[str, Any]) -> bool:
    """Return the field `stream`. Stricter than vLLM, which also takes 1 and "yes"."""
    stream = body.get("stream", False)
    if stream is not None and not isinstance(stream, bool):
        raise RequestError("'stream' must be a boolean", param="stream")
    return bool(stream)


def read_output_limit(body: Mapping[str, Any], *names: str, least: int = 1) -> int | None:
    """Return the first of the fields `names` that is given, in tokens; None for none of them."""
    for name in names:
        limit = body.get(name)
        if limit is None:
            continue
        limit = _as_integer(limit)
        if type(limit) is not int or not least <= limit <= MAX_OUTPUT_TOKENS:
            kind = "a positive integer" if least else "an integer from 0"
            raise RequestError(f"{name!r} must be {kind}", param=name)
        return limit
    return None


def read_choices(body: Mapping[str, Any]) -> int:
    """Return the field `n`."""
    choices = body.get("n")
    if choices is None:
        return 1
    choices = _as_integer(choices)
    if type(choices) is not int or not 1 <= choices <= MAX_CHOICES:
        raise RequestError(f"'n' must be an integer from 1 to {MAX_CHOICES}", param="n")
    return choices


def _as_integer(value: Any) -> Any:
    """Return a number that is written as 5.0 or "5" as an integer, as vLLM reads it."""
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) <= _MAX_DIGITS and value.isdecimal():
        return int(value)
    return value


def check_stops(body: Mapping[str, Any], name: str = "stop") -> None:
    """Raise RequestError for more than MAX_STOPS stop texts."""
    stops = body.get(name)
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        raise RequestError(
            f"{name!r} has {len(stops)} texts; at most {MAX_STOPS} are accepted", param=name
        )


def read_truncation(body: Mapping[str, Any]) -> int | None:
    """Return `truncate_prompt_tokens`; what vLLM refuses is left to it."""
    limit = body.get("truncate_prompt_tokens")
    return limit if type(limit) is int and limit >= -1 else None


def read_tools(body: Mapping[str, Any], name: str = "tools") -> list[Any]:
    """Return the tools of a body, [] for none; vLLM's errors about their form are passed on."""
    tools = body.get(name)
    if not isinstance(tools, list):
        return []
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{name!r} has {len(tools)} entries; at most {MAX_TOOLS}", param=name)
    return tools


def prefix_seed(body: Mapping[str, Any], tools: Sequence[Any] = ()) -> int:
    """Return a hash of what precedes the messages in the engine's cache.

    Chat templates put tools into the first message or before it, so prompts with different tools
    share no prefix. `cache_salt` keeps clients' prefixes apart.
    """
    seed = _hash_json(tools) if tools else 0
    salt = body.get("cache_salt")
    return crc32(salt.encode("utf-8", "surrogatepass"), seed) if isinstance(salt, str) else seed


def _hash_json(value: Any) -> int:
    try:
        return crc32(to_json(value))
    except ValueError:  # a lone surrogate, which no body that was parsed from JSON has
        return crc32(repr(value).encode("utf-8", "surrogatepass"))


def needs(**wanted: bool) -> tuple[str, ...]:
    """Return the sorted names of the capabilities that are wanted.

    >>> needs(tools=True, chat=True, vision=False)
    ('chat', 'tools')
    """
    return tuple(sorted(name for name, is_wanted in wanted.items() if is_wanted))


def unmarked(text: str) -> str:
    """Return `text` without the sign that starts a message (`transcript.START`).

    A text that contains it could hide from patterns what follows it.
    """
    return text.replace(START, " ") if START in text else text


def read_prompts(value: Any, name: str, *, may_be_empty: bool = False) -> Prompts:
    """Read a text, token ids, or a list of either. Raises RequestError naming the field `name`."""
    if isinstance(value, str):
        if not (value or may_be_empty):
            raise RequestError(f"{name!r} must not be empty", param=name)
        return Prompts(unmarked(value), 1)
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds != {int}:
            check_count(value, name)
        if kinds == {str}:
            longest = max(map(len, value))
            return Prompts(unmarked("\n".join(value)), len(value), sequence_chars=longest)
        if kinds == {int}:
            return _token_ids([value])
        if kinds == {list} and all(ids and set(map(type, ids)) == {int} for ids in value):
            return _token_ids(value)
    raise RequestError(
        f"{name!r} must be a text, a list of token ids, or a list of one of these, and not empty",
        param=name,
    )


def check_count(prompts: Sequence[Any], name: str) -> None:
    """Raise RequestError for more than MAX_PROMPTS prompts in the field `name`."""
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(
            f"{name!r} has {len(prompts)} entries; at most {MAX_PROMPTS} are accepted", param=name
        )


def _token_ids(prompts: Sequence[Sequence[int]]) -> Prompts:
    lengths = list(map(len, prompts))
    return Prompts(
        "",
        len(prompts),
        is_token_ids=True,
        input_tokens=sum(lengths),
        sequence_tokens=max(lengths),
        prefix=",".join(map(str, prompts[0][:_PREFIX_IDS])),
    )


def read_format(wanted: Any, name: str) -> tuple[OutputShape, Mapping[str, Any] | None]:
    """Return the shape that a field such as `response_format` states, and its schema or None.

    Raises RequestError for a kind that vLLM does not have, and for a schema that is too large, too
    deep, or refers to nothing but itself.
    """
    if wanted is None:
        return OutputShape.TEXT, None
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "text":
        return OutputShape.TEXT, None
    if kind == "json_object":
        return OutputShape.JSON, None
    if kind == "structural_tag":
        return OutputShape.GUIDED, None
    if kind != "json_schema":
        raise RequestError(
            f"'{name}.type' must be text, json_object, json_schema or structural_tag", param=name
        )
    envelope = wanted.get("json_schema", wanted)  # Responses and Anthropic have no envelope
    schema = envelope.get("schema") if isinstance(envelope, Mapping) else None
    return OutputShape.JSON_SCHEMA, check_schema(schema, name)


def check_schema(schema: Any, name: str) -> Mapping[str, Any] | None:
    """Return `schema` if it is an object, else None. Raises RequestError as `read_format` does."""
    if not isinstance(schema, Mapping):
        return None
    level: list[Any] = [schema]
    count, depth, referring = 0, 0, False
    while level:
        count, depth = count + len(level), depth + 1
        if count > MAX_SCHEMA_NODES or depth > MAX_SCHEMA_DEPTH:
            raise RequestError(
                f"the JSON schema in {name!r} has more than {MAX_SCHEMA_NODES} objects and lists, "
                f"or more than {MAX_SCHEMA_DEPTH} levels",
                param=name,
            )
        referring = referring or any("$ref" in node for node in level if isinstance(node, Mapping))
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, Mapping) else node)
            if isinstance(child, Mapping | list)
        ]
    if referring and (ref := _bottomless(schema)):
        raise RequestError(
            f"the JSON schema in {name!r} is not satisfiable: {ref!r} refers to nothing but itself",
            param=name,
        )
    return schema


def _bottomless(schema: Mapping[str, Any]) -> str:
    """Return a local reference from which only references are reached; "" when there is none."""
    targets: dict[str, Any] = {}
    open_nodes: list[Any] = [schema]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, Mapping):
            if (ref := _local_ref(node)) and ref not in targets:
                if len(targets) == _MAX_REFS:
                    return ""
                targets[ref] = _target(schema, ref)
            open_nodes += node.values()
        elif isinstance(node, list):
            open_nodes += node
    # The least fixed point: a reference has ground when its target has, given those found before.
    pending, grounded = list(targets), set[str]()
    for _ in range(_REFERENCE_ROUNDS):
        left = []
        for ref in reversed(pending):
            if _has_ground(targets[ref], grounded):
                grounded.add(ref)
            else:
                left.append(ref)
        if len(left) == len(pending):
            return left[-1] if left else ""
        pending = left
    return ""


def _has_ground(node: Any, grounded: set[str]) -> bool:
    if not isinstance(node, Mapping):
        return True
    if (ref := _local_ref(node)) and ref not in grounded:
        return False
    every, some = node.get("allOf"), (node.get("anyOf"), node.get("oneOf"))
    if isinstance(every, list) and not all(_has_ground(n, grounded) for n in every):
        return False
    return all(
        any(_has_ground(n, grounded) for n in options)
        for options in some
        if isinstance(options, list) and options
    )


def _local_ref(node: Mapping[str, Any]) -> str:
    ref = node.get("$ref")
    return ref if isinstance(ref, str) and ref[:1] == "#" and len(ref) <= _MAX_REF_CHARS else ""


def _target(schema: Mapping[str, Any], ref: str) -> Any:
    node: Any = schema
    for part in ref.removeprefix("#").split("/"):
        if part and isinstance(node, Mapping):
            node = node.get(part.replace("~1", "/").replace("~0", "~"))
    return node
