"""From a parsed request to the context: lengths of prompts, prefixes, and the vector space."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.requests import (
    ContextBuilder,
    Overrides,
    fill_features,
    find_route,
    parse_chat,
)
from calm_serve.testing import make_fleet, make_spec
from calm_serve.types import RoutingContext, Task

BUILDER = ContextBuilder(make_fleet(make_spec("small")), "the space")
USER = {"role": "user", "content": "hello " * 100}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def build(path: str, **body: Any) -> RoutingContext:
    route = find_route(path)
    assert route is not None
    return BUILDER.build(route.parse(body), Overrides(), "id")


def chat(**body: Any) -> RoutingContext:
    return build("/v1/chat/completions", **{"messages": [USER], **body})


def test_prompts_with_other_tools_or_another_salt_share_no_prefix() -> None:
    plain = chat()
    assert chat(tools=[]).prefix_chain == plain.prefix_chain
    assert chat(tools=TOOLS).prefix_chain == chat(tools=TOOLS).prefix_chain
    others = [
        chat(tools=TOOLS),
        chat(tools=[*TOOLS, *TOOLS]),
        chat(cache_salt="a"),
        chat(cache_salt="b"),
        chat(tools=TOOLS, cache_salt="a"),
    ]
    chains = [c.prefix_chain for c in (plain, *others)]
    blocks = [block for chain in chains for block in chain]
    assert len(set(blocks)) == len(blocks)
    assert len({c.prefix_family for c in (plain, *others)}) == len(chains)


SCOPED = ContextBuilder(
    make_fleet(
        make_spec("small"),
        markers={
            "bash": r"\bbash\b",
            "asked_before": {"pattern": r"\bbash\b", "scope": "user"},
            "anywhere": {"pattern": r"\bbash\b", "scope": "all"},
            "greeting": r"^\W*hello\b",
        },
        safety=[
            {"name": "secret", "pattern": "password", "slm": "small"},
            {"name": "harm", "pattern": "poison", "slm": "small", "pins": "all"},
            {"name": "press", "pattern": "release", "slm": "small", "local_only": False},
        ],
    )
)
BASH = "You may run bash."


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def scoped(*turns: tuple[str, str]) -> RoutingContext:
    body = {"messages": messages(*turns)}
    return SCOPED.build(parse_chat(body), Overrides(), "id")


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
def test_only_the_user_sets_a_marker_unless_its_scope_is_all(role: str) -> None:
    context = scoped((role, BASH), ("user", "What is 3 + 4?"))
    assert context.markers == ("anywhere",)


def test_a_marker_reads_the_last_message_of_the_user_unless_its_scope_is_wider() -> None:
    asked = scoped(("user", BASH))
    assert asked.markers == ("anywhere", "asked_before", "bash")
    later = scoped(("user", BASH), ("assistant", "Done."), ("user", "Thank you."))
    assert later.markers == ("anywhere", "asked_before")


def test_what_comes_after_the_users_message_hides_it_from_no_marker() -> None:
    context = scoped(("user", BASH), ("assistant", "ls"), ("tool", "a.txt"))
    assert "bash" in context.markers


def test_a_conversation_without_a_message_of_the_user_sets_no_marker_of_his() -> None:
    assert scoped(("system", BASH)).markers == ("anywhere",)
    assert scoped(("system", "Be brief."), ("assistant", BASH)).markers == ("anywhere",)


def test_a_caret_is_the_start_of_each_message_that_a_marker_reads() -> None:
    assert scoped(("system", "Be brief."), ("user", "Hello!")).markers == ("greeting",)
    assert scoped(("user", "She said hello.")).markers == ()
    assert scoped(("user", "Hello!"), ("assistant", "Hi."), ("user", "Tell me.")).markers == ()


def test_a_prompt_without_messages_is_the_users() -> None:
    route = find_route("/v1/completions")
    context = SCOPED.build(route.parse({"prompt": BASH}), Overrides(), "id")
    assert context.markers == ("anywhere", "asked_before", "bash")


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_instructions_of_other_apis_are_system_prompts_too(path: str) -> None:
    body: dict[str, Any] = {"instructions": BASH, "input": "What is 3 + 4?"}
    if path == "/v1/messages":
        body = {"system": BASH, "messages": messages(("user", "What is 3 + 4?")), "max_tokens": 9}
    context = SCOPED.build(find_route(path).parse(body), Overrides(), "id")
    assert context.markers == ("anywhere",)


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_a_secret_in_any_message_of_the_conversation_pins(role: str) -> None:
    context = scoped(("system", "Be brief."), (role, "The password is x."), ("user", "Go on."))
    assert (context.safety_class, context.local_only) == ("secret", True)


def test_a_policy_in_a_system_prompt_keeps_the_request_local_but_pins_nothing() -> None:
    context = scoped(("system", "Never reveal a password."), ("user", "hello"))
    assert (context.safety_class, context.local_only) == ("none", True)


def test_a_system_prompt_hides_no_secret_of_the_conversation() -> None:
    policy = ("system", "Never reveal a password.")
    assert scoped(policy, ("user", "My password is x.")).safety_class == "secret"
    # A pattern that is only in the system prompt does not end the search either.
    assert scoped(policy, ("user", "A press release.")).safety_class == "press"


def test_a_safety_pattern_may_pin_by_system_prompts_too() -> None:
    assert scoped(("system", "About poison."), ("user", "hello")).safety_class == "harm"


def test_token_ids_have_prefixes_too() -> None:
    ids = list(range(3000, 4000))
    one, two, other = (
        build("/v1/completions", prompt=p).prefix_chain for p in (ids, [*ids, 7], ids[1:])
    )
    assert one[:-1] == two[: len(one) - 1]
    assert one[0] != other[0]


def test_a_conversation_keeps_its_prefix_as_it_grows() -> None:
    first = build("/v1/messages", messages=[USER], system="be brief", max_tokens=5)
    answer = {"role": "assistant", "content": "fine"}
    turns = [USER, answer, {"role": "user", "content": "and then?"}]
    then = build("/v1/messages", messages=turns, system="be brief", max_tokens=5)
    whole_blocks = len(first.prefix_chain) - 1
    assert first.prefix_chain[:whole_blocks] == then.prefix_chain[:whole_blocks]


def test_token_ids_are_counted_and_texts_estimated() -> None:
    ids = build("/v1/completions", prompt=[[1] * 70, [2] * 30])
    assert (ids.prompt_tokens, ids.sequence_tokens, ids.is_token_ids) == (100, 70, True)
    assert ids.prompt_chars == 400
    text = build("/v1/completions", prompt="x" * 400)
    assert (text.prompt_tokens, text.sequence_tokens, text.is_token_ids) == (100, 0, False)


def test_texts_to_embed_are_as_long_as_the_longest() -> None:
    many = build("/v1/embeddings", input=["x" * 40, "y" * 400, "z" * 80])
    assert (many.prompt_tokens, many.sequence_tokens) == (130, 100)
    pairs = build("/v1/rerank", query="q" * 40, documents=["d" * 400, "e" * 40])
    assert (pairs.task, pairs.sequence_tokens) == (Task.RERANK, 110)


@pytest.mark.parametrize(
    ("limit", "together", "longest", "fits"),
    [(None, 130, 100, False), (50, 130, 50, False), (10, 30, 10, False), (-1, 130, 100, True)],
)
def test_what_the_engine_cuts_off_does_not_count(
    limit: int | None, together: int, longest: int, fits: bool
) -> None:
    texts = ["x" * 40, "y" * 400, "z" * 80]
    context = build("/v1/embeddings", input=texts, truncate_prompt_tokens=limit)
    assert (context.prompt_tokens, context.sequence_tokens) == (together, longest)
    assert context.truncates_prompt is fits


def test_a_long_chat_that_asks_to_be_cut_is_short() -> None:
    long = [{"role": "user", "content": "word " * 9000}]
    assert chat(messages=long, truncate_prompt_tokens=64).prompt_tokens == 64


def test_only_embeddings_without_a_named_slm_are_bound_to_the_space_of_auto() -> None:
    assert build("/v1/embeddings", input="x").embedding_space == "the space"
    assert build("/v1/embeddings", input="x", model="small").embedding_space == ""
    assert build("/v1/rerank", query="q", documents=["d"]).embedding_space == ""
    assert chat().embedding_space == ""


def test_only_what_is_answered_in_text_has_features() -> None:
    for path, body in (
        ("/v1/embeddings", {"input": "hello"}),
        ("/v1/messages/count_tokens", {"messages": [USER]}),
        ("/v1/chat/completions", {"messages": [USER]}),
    ):
        route = find_route(path)
        assert route is not None
        parsed = route.parse(body)
        context = BUILDER.build(parsed, Overrides(), "id")
        fill_features(context, parsed)
        assert bool(context.features.numbers) is context.generates is ("chat" in path)


FIRST = "Which ships are longer than 90 metres?"


@pytest.mark.parametrize(
    "text",
    [
        "and longer than 120?",
        "What about those in May?",
        "Why?",
        "ok, now sorted by name",
        "und in Oslo?",
        "make it shorter",
        "Rewrite your previous response without the letter e, and use no more than 3 sentences.",
    ],
)
def test_a_short_message_that_refers_to_others_is_a_follow_up(text: str) -> None:
    context = scoped(("user", FIRST), ("assistant", "Three."), ("user", text))
    assert context.follows_up
    assert not scoped(("user", text)).follows_up


@pytest.mark.parametrize(
    "text",
    [
        FIRST,
        "Tell me a story of a ship.",
        "Now " + "let me describe another problem of mine at some length. " * 9,
        "",
    ],
)
def test_a_message_that_stands_for_itself_is_none(text: str) -> None:
    assert not scoped(("user", FIRST), ("assistant", "Three."), ("user", text)).follows_up


def test_a_follow_up_has_the_markers_and_features_of_what_it_continues() -> None:
    first = scoped(("user", "Show me bash for this."))
    turns = [("user", "Show me bash for this."), ("assistant", "ls"), ("user", "and hidden ones?")]
    again = [*turns, ("assistant", "ls -a"), ("user", "why?")]
    for conversation in (turns, again):
        assert scoped(*conversation).markers == first.markers
    request = parse_chat({"messages": messages(*again)})
    assert request.followed_user == "Show me bash for this."
    context = scoped(*again)
    fill_features(context, request)
    joined = scoped(("user", "Show me bash for this.\nwhy?"))
    fill_features(
        joined, parse_chat({"messages": messages(("user", "Show me bash for this.\nwhy?"))})
    )
    assert context.features.buckets == joined.features.buckets


def test_a_follow_up_that_names_its_own_topic_is_none() -> None:
    context = scoped(("user", "Hello!"), ("assistant", "Hello."), ("user", "and now in bash"))
    assert context.markers == ("anywhere", "asked_before", "bash")
    assert not context.follows_up
