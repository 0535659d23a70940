"""Usage: the tokens that an upstream reports, and what they cost.

The upstream is not trusted: what cannot be a number of tokens counts as not reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from calm_serve.config import Prices

MAX_TOKENS = 10_000_000  # of a prompt or an answer; no context is longer
MAX_CHOICES = 128  # OpenAI's limit of `n`; further choices are not read


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, in tokens; 0 is none or not reported."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    output_tokens: int = 0
    reasoning_tokens: int = 0  # of the output

    def merged(self, later: Usage) -> Usage:
        """Return this usage with what a later event adds.

        Usage in streams is cumulative or comes in parts, so the larger number of each kind is the
        answer's. A later event without usage takes nothing away.
        """
        return Usage(
            max(self.prompt_tokens, later.prompt_tokens),
            max(self.cached_tokens, later.cached_tokens),
            max(self.output_tokens, later.output_tokens),
            max(self.reasoning_tokens, later.reasoning_tokens),
        )


def usage_of(document: Mapping[str, Any]) -> Usage | None:
    """Return the usage in an answer or a stream's event, wherever it stands; None without one."""
    usage: Usage | None = None
    for found in _places(document):
        if isinstance(found, Mapping) and found:
            one = _read(found)
            usage = one if usage is None else usage.merged(one)
    return usage


def cost(usage: Usage, prices: Prices) -> float:
    """Return what `usage` costs, in the currency of `prices`."""
    cached_tokens = min(usage.cached_tokens, usage.prompt_tokens)
    per_cached = prices.cached_input_per_million_tokens
    if per_cached is None:
        per_cached = prices.input_per_million_tokens
    return (
        (usage.prompt_tokens - cached_tokens) * prices.input_per_million_tokens
        + cached_tokens * per_cached
        + usage.output_tokens * prices.output_per_million_tokens
    ) / 1e6


def _places(document: Mapping[str, Any]) -> Iterator[Any]:
    yield document.get("usage")
    # Groq; Responses' events; Anthropic's message_start.
    for name in ("x_groq", "response", "message"):
        part = document.get(name)
        if isinstance(part, Mapping):
            yield part.get("usage")
    choices = document.get("choices")
    if isinstance(choices, list):
        for choice in choices[:MAX_CHOICES]:
            if isinstance(choice, Mapping):
                yield choice.get("usage")


def _read(usage: Mapping[str, Any]) -> Usage:
    prompt = _first(usage, "prompt_tokens", "input_tokens")
    output = _first(usage, "completion_tokens", "output_tokens")
    cached = _first(usage, "cache_read_input_tokens", "prompt_cache_hit_tokens", "cached_tokens")
    if "prompt_tokens" not in usage:
        # Anthropic counts the cached parts apart from the rest of the prompt.
        prompt += _count(usage.get("cache_read_input_tokens"))
        prompt += _count(usage.get("cache_creation_input_tokens"))
    prompt = min(prompt, MAX_TOKENS)
    of_prompt = _first(_details(usage, "prompt", "input"), "cached_tokens")
    of_output = _first(_details(usage, "completion", "output"), "reasoning_tokens")
    return Usage(
        prompt_tokens=prompt,
        cached_tokens=min(cached or of_prompt, prompt),
        output_tokens=output,
        reasoning_tokens=min(of_output, output),
    )


def _details(usage: Mapping[str, Any], *kinds: str) -> Mapping[str, Any]:
    for kind in kinds:
        details = usage.get(f"{kind}_tokens_details")
        if isinstance(details, Mapping):
            return details
    return {}


def _first(values: Mapping[str, Any], *names: str) -> int:
    return next((count for name in names if (count := _count(values.get(name)))), 0)


def _count(value: Any) -> int:
    """Return a number of tokens; 0 for what cannot be one."""
    if type(value) is float and value.is_integer():  # JSON does not tell 12.0 from 12
        value = int(value)
    return value if type(value) is int and 0 < value <= MAX_TOKENS else 0
