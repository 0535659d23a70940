"""Usage: read wherever it stands, never believed, and priced."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.config import Prices
from calm_serve.upstreams.usage import MAX_TOKENS, Usage, cost, usage_of

OPENAI = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
RESPONSES = {
    "input_tokens": 100,
    "output_tokens": 20,
    "input_tokens_details": {"cached_tokens": 64},
    "output_tokens_details": {"reasoning_tokens": 5},
}
ALL = Usage(100, 64, 20, 5)


@pytest.mark.parametrize(
    "document",
    [
        {"usage": OPENAI},
        {"usage": RESPONSES},
        {"usage": None, "choices": [{"index": 0, "usage": OPENAI}]},
        {"x_groq": {"id": "r", "usage": OPENAI}},
        {"type": "response.completed", "response": {"usage": RESPONSES}},
    ],
)
def test_usage_is_found_wherever_it_stands(document: dict[str, Any]) -> None:
    assert usage_of(document) == ALL


def test_anthropics_cached_tokens_are_part_of_the_prompt() -> None:
    usage = {
        "input_tokens": 30,
        "cache_read_input_tokens": 60,
        "cache_creation_input_tokens": 10,
        "output_tokens": 1,
    }
    assert usage_of({"message": {"usage": usage}}) == Usage(100, 60, 1, 0)


def test_deepseeks_cached_tokens_are_in_the_prompt_already() -> None:
    usage = {"prompt_tokens": 100, "prompt_cache_hit_tokens": 64, "completion_tokens": 2}
    assert usage_of({"usage": usage}) == Usage(100, 64, 2, 0)


@pytest.mark.parametrize("document", [{}, {"usage": None}, {"usage": {}}, {"usage": [1]}])
def test_no_usage_is_not_the_same_as_none_used(document: dict[str, Any]) -> None:
    assert usage_of(document) is None
    assert usage_of({"usage": {"prompt_tokens": 0}}) == Usage()


def test_a_later_event_adds_and_takes_nothing_away() -> None:
    start, end = Usage(prompt_tokens=9, output_tokens=1), Usage(output_tokens=7)
    assert start.merged(end) == Usage(prompt_tokens=9, output_tokens=7)
    assert start.merged(Usage()) == start


@pytest.mark.parametrize("value", [-1, "12", True, 1.5, None, [1], {}, MAX_TOKENS + 1, 1e300])
def test_what_is_no_number_of_tokens_counts_as_not_reported(value: Any) -> None:
    assert usage_of({"usage": {"prompt_tokens": value, "completion_tokens": 3}}) == Usage(0, 0, 3)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*OPENAI, *RESPONSES, "usage", "choices", "cached_tokens", "message"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["usage", "choices", "x_groq", "message"]), ANY))
def test_no_document_breaks_it_or_gives_more_than_the_bounds(document: dict[str, Any]) -> None:
    usage = usage_of(document) or Usage()
    assert 0 <= usage.cached_tokens <= usage.prompt_tokens <= MAX_TOKENS
    assert 0 <= usage.reasoning_tokens <= usage.output_tokens <= MAX_TOKENS


def test_costs_tell_cached_tokens_from_others() -> None:
    prices = Prices(
        input_per_million_tokens=3.0,
        cached_input_per_million_tokens=0.3,
        output_per_million_tokens=15.0,
    )
    usage = Usage(prompt_tokens=1_000_000, cached_tokens=400_000, output_tokens=100_000)
    assert cost(usage, prices) == pytest.approx(0.6 * 3 + 0.4 * 0.3 + 0.1 * 15)


def test_without_a_price_of_its_own_a_cached_token_costs_as_any_other() -> None:
    prices = Prices(input_per_million_tokens=2.0, output_per_million_tokens=0.0)
    assert cost(Usage(1_000_000, 500_000, 9, 0), prices) == pytest.approx(2.0)
