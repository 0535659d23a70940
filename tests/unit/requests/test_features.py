"""A request becomes numbers: bounded, stable, and only here."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.prediction.base import LOAD_NAMES, load_vector
from calm_serve.requests import Overrides, features, parse_chat
from calm_serve.requests.context import (
    BLOCK_CHARS,
    MAX_BLOCKS,
    SCAN_CHARS,
    ContextBuilder,
    prefix_chain,
)
from calm_serve.requests.features import (
    BUCKETS,
    FOCUS_CHARS,
    NUMBER_NAMES,
    fill_features,
    token_buckets,
)
from calm_serve.requests.tokens import (
    HEAD_TOKENS,
    TAIL_TOKENS,
    TokenStats,
    read_tokens,
)
from calm_serve.testing import make_fleet, make_state
from calm_serve.types import FIRST_WORD, RoutingContext

FLEET = make_fleet(
    markers={"sql": r"\bselect\b", "code": "```", "greeting": r"^\W*hello\b"},
    safety=[
        {"name": "secret", "pattern": "password|^my diary", "slm": "small"},
        {"name": "public", "pattern": "press release", "slm": "large", "local_only": False},
    ],
)
BUILDER = ContextBuilder(FLEET)


def build(text: str, overrides: Overrides | None = None, **fields: Any) -> RoutingContext:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    parsed = parse_chat(body)
    context = BUILDER.build(parsed, overrides or Overrides(), "request")
    fill_features(context, parsed)
    return context


def number(context: RoutingContext, name: str) -> float:
    return float(context.features.numbers[NUMBER_NAMES.index(name)])


@given(st.text())
def test_any_text_gives_the_full_row_of_finite_numbers(text: str) -> None:
    context = build(text)
    assert len(context.features.numbers) == len(NUMBER_NAMES)
    assert all(map(math.isfinite, context.features.numbers))
    assert list(context.features.buckets) == sorted(set(context.features.buckets))
    assert all(FIRST_WORD <= b < FIRST_WORD + BUCKETS for b in context.features.buckets)
    assert context.prompt_tokens >= 1


@given(st.text(), st.text(min_size=1))
def test_what_lies_beyond_the_scan_window_changes_nothing_but_safety(
    inside: str, beyond: str
) -> None:
    head = "Write a report. " * (BLOCK_CHARS * MAX_BLOCKS // 8) + inside
    tail = "What is left?".rjust(2 * SCAN_CHARS, "-")
    filler = ("select ``` pass word ¿" + beyond) * 2000
    size = 30_000
    one = build(head + filler[:size].ljust(size) + tail)
    other = build(head + "." * size + tail)
    assert one == other


def test_markers_and_safety_are_found_at_both_ends() -> None:
    long = "lorem ipsum " * 1000
    assert build("select me. " + long).markers == ("sql",)
    assert build(long + " and select me").markers == ("sql",)
    assert build(long + " my password").safety_class == "secret"


def test_safety_patterns_see_the_whole_text() -> None:
    long = "lorem ipsum " * 1000
    assert build(long + " my password is here " + long).safety_class == "secret"
    assert build("my diary, please").safety_class == "secret"
    assert build("not my diary").safety_class == "none"


def test_markers_are_sorted_and_case_does_not_matter() -> None:
    assert build("```SELECT 1```").markers == ("code", "sql")


def test_a_safety_pattern_keeps_the_request_local_only_where_it_says_so() -> None:
    assert build("my password").local_only
    assert not build("a press release").local_only
    assert build("a press release", Overrides(local_only=True)).local_only
    assert build("good morning").safety_class == "none"


@pytest.mark.parametrize("text", ["x" * 100_000, "€" * 100_000, "𝄞" * 100_000])
def test_the_prefix_chain_is_bounded_whatever_the_characters(text: str) -> None:
    assert len(prefix_chain(text)) == MAX_BLOCKS


@given(st.text(max_size=600), st.text(max_size=600), st.text(max_size=600))
def test_prompts_share_the_chain_of_their_common_whole_blocks(
    start: str, one: str, other: str
) -> None:
    shared = len(start.encode()) // BLOCK_CHARS
    assert prefix_chain(start + one)[:shared] == prefix_chain(start + other)[:shared]


def test_different_first_blocks_give_different_chains_throughout() -> None:
    long = "tail " * 200
    pairs = zip(prefix_chain("a" + long), prefix_chain("b" + long), strict=True)
    assert all(one != other for one, other in pairs)


def test_even_an_empty_prompt_has_a_prefix_family() -> None:
    assert prefix_chain("") == (0,)
    assert len(build("").prefix_family) == 8


def test_sessions_are_hashed_and_absent_ones_stay_empty() -> None:
    assert build("hi").session_key == ""
    key = build("hi", Overrides(session_id="alice@example.org")).session_key
    assert len(key) == 8
    assert "alice" not in key


def test_no_text_of_the_prompt_is_in_the_context() -> None:
    context = build("the unmistakable word is xylophonist")
    assert "xylophonist" not in repr(context)


def test_word_order_and_words_make_a_difference() -> None:
    one, other = read_tokens("dog bites man"), read_tokens("man bites dog")
    assert token_buckets(one.hashes) != token_buckets(other.hashes)
    assert token_buckets(read_tokens("dog").hashes) != token_buckets(read_tokens("man").hashes)


@pytest.mark.parametrize("other", ["x", "ø"])
def test_only_the_first_and_last_words_are_hashed(other: str) -> None:
    head = " ".join(f"{a}{b}" for a in "abcdef" for b in "abcdefgh")
    tail = " ".join(f"z{a}" for a in "abcdefghijklmnop")
    one, two = (read_tokens(f"{head} {x} {tail}").hashes.tolist() for x in ("y", other))
    assert one == two
    assert len(one) == HEAD_TOKENS + TAIL_TOKENS


@pytest.mark.parametrize("character", ["a", "é", " ", "!"])
def test_words_are_read_from_the_ends_only(character: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def reading(text: str) -> TokenStats:
        lengths.append(len(text))
        return read_tokens(text)

    monkeypatch.setattr(features, "read_tokens", reading)
    build(character * 1_000_000)
    assert lengths == [2 * FOCUS_CHARS + 1]


def test_the_size_of_a_number_is_not_vocabulary() -> None:
    assert build("add 17 and 4").features.buckets == build("add 99 and 5").features.buckets


@pytest.mark.parametrize(
    ("text", "fields", "name", "value"),
    [
        ("Is it?", {}, "ends_with_question", 1.0),
        ("It is.", {}, "ends_with_question", 0.0),
        ("It is. So it is.", {}, "sentences", 2.0),
        ("each of 3 costs 12.50", {}, "numerals", 3.0),
        ("each of 3 costs 12500", {}, "large_numerals", 1.0),
        ("each and every one", {}, "quantity_words", 2.0),
        ("a b a b", {}, "type_token_ratio", 0.5),
        ("Ünder", {}, "non_ascii_ratio", 2 / 6),
        ("```x```", {}, "has_code", 1.0),
        ("good morning", {}, "has_code", 0.0),
        ("hi", {"response_format": {"type": "json_object"}}, "shape_json", 1.0),
        ("hi", {"tools": [{}]}, "shape_tools", 1.0),
        ("hi", {"structured_outputs": {"regex": "a"}}, "shape_guided", 1.0),
        ("hi", {"max_tokens": 99}, "log_max_output_tokens", math.log(100)),
    ],
)
def test_numbers_say_what_their_names_say(
    text: str, fields: dict[str, Any], name: str, value: float
) -> None:
    assert number(build(text, **fields), name) == pytest.approx(value)


def test_the_token_estimate_grows_with_the_prompt() -> None:
    assert build("x" * 4000).prompt_tokens > 900


def test_the_load_vector_has_a_value_per_name() -> None:
    state = make_state(running=8, waiting=8, capacity=16, kv_usage_ratio=0.3)
    vector = load_vector(state, 0.1)
    named = dict(zip(LOAD_NAMES, vector, strict=True))
    assert named["load_ratio"] == 1.0
    assert named["hot"] == 1.0
    assert named["log_analytic_ttft"] == pytest.approx(math.log(0.1))
    assert math.isfinite(load_vector(make_state(replicas=0), 0.0)[-1])


def test_the_context_is_the_same_in_a_process_with_another_hash_seed() -> None:
    program = (
        "from calm_serve.requests import ContextBuilder, fill_features\n"
        "from calm_serve.requests import Overrides, parse_chat\n"
        "from calm_serve.testing import make_fleet\n"
        "fleet = make_fleet(markers={'a': 'alpha', 'b': 'beta'})\n"
        "body = {'messages': [{'role': 'user', 'content': 'Compare alpha to beta, please.'}]}\n"
        "request = parse_chat(body)\n"
        "context = ContextBuilder(fleet).build(request, Overrides(session_id='s'), 'id')\n"
        "fill_features(context, request)\n"
        "print(context)\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1
    assert "RoutingContext" in answers.pop()
