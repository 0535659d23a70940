"""Real models behind one endpoint: chats, tools and vectors, with the official clients.

SmolLM2 is served twice: as it is, and with a chat template that takes tools. MiniLM is served
twice, in two vector spaces.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.integration.packaged_fleet import packaged_config
from tests.integration.served_fleet import ServedFleet, eventually

PARIS = "What is the capital of France? Answer in one sentence."
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        # A grammar in which no text is endless: so small a model does not end one by itself.
        "properties": {"city": {"type": "string", "enum": ["Berlin", "Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
# vLLM holds a call to its schema where the client asks for it.
TOOL: Any = {"type": "function", "function": {**WEATHER, "strict": True}}
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
RELATED = ["A man is eating food.", "A man is eating a meal.", "The stock market fell today."]


@pytest.fixture(scope="module")
def fleet() -> Iterator[ServedFleet]:
    """The fleet of packaged models, one router."""
    with ServedFleet(packaged_config()).running() as served:
        yield served


@pytest.fixture
def client(fleet: ServedFleet) -> openai.OpenAI:
    return fleet.openai()


@pytest.fixture
def claude(fleet: ServedFleet) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=fleet.url, api_key="none", max_retries=0)


def test_a_chat_is_answered_plain_and_streamed(client: openai.OpenAI) -> None:
    ask: Any = [{"role": "user", "content": PARIS}]
    whole = client.chat.completions.create(model="smollm2", messages=ask, max_tokens=30)
    assert "Paris" in (whole.choices[0].message.content or "")
    parts = client.chat.completions.create(
        model="smollm2", messages=ask, max_tokens=30, stream=True
    )
    text = "".join(c.choices[0].delta.content or "" for c in parts if c.choices)
    assert text == whole.choices[0].message.content


def test_several_choices_are_all_counted(fleet: ServedFleet) -> None:
    body = {"model": "smollm2", "messages": ASK, "n": 3, "max_tokens": 5, "temperature": 1.0}
    answer = fleet.post("/v1/chat/completions", body)
    assert len(answer.json()["choices"]) == 3
    outcome = fleet.outcome(answer.headers["x-calm-decision-id"])
    assert outcome.engine.output_tokens == answer.json()["usage"]["completion_tokens"]
    assert outcome.engine.output_tokens > 5


def test_a_list_of_prompts_and_token_ids_are_completed(client: openai.OpenAI) -> None:
    texts = client.completions.create(model="smollm2", prompt=["One, two,", "A, B,"], max_tokens=4)
    assert [c.index for c in texts.choices] == [0, 1]
    assert texts.usage is not None and texts.usage.completion_tokens == 8
    ids = httpx.post(
        f"{client.base_url}".removesuffix("v1/") + "tokenize",
        json={"model": "smollm2", "prompt": "One, two,", "add_special_tokens": False},
    ).json()["tokens"]
    same = client.completions.create(model="smollm2", prompt=ids, max_tokens=4)
    assert same.choices[0].text == texts.choices[0].text


def test_responses_are_answered_plain_and_streamed(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="smollm2", input=PARIS, max_output_tokens=30)
    assert "Paris" in whole.output_text
    events = list(
        client.responses.create(model="smollm2", input=PARIS, max_output_tokens=30, stream=True)
    )
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert "Paris" in text
    assert events[-1].type == "response.completed"


def test_what_needs_a_store_is_refused_by_its_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="smollm2", input=PARIS, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_messages_are_answered_plain_and_streamed(claude: anthropic.Anthropic) -> None:
    ask: Any = [{"role": "user", "content": PARIS}]
    whole = claude.messages.create(model="smollm2", messages=ask, max_tokens=30)
    assert whole.content[0].type == "text" and "Paris" in whole.content[0].text
    with claude.messages.stream(model="smollm2", messages=ask, max_tokens=30) as stream:
        assert "Paris" in "".join(stream.text_stream)
    assert claude.messages.count_tokens(model="smollm2", messages=ask).input_tokens > 5


def test_anthropics_client_understands_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="absent", messages=ASK, max_tokens=5)
    assert caught.value.body["type"] == "error"  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="tools", messages=ASK, tools=[TOOL], tool_choice=choice, max_tokens=150
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_a_whole_tool_loop_ends_with_an_answer(client: openai.OpenAI) -> None:
    messages = list(ASK)
    first = client.chat.completions.create(
        model="tools", messages=messages, tools=[TOOL], tool_choice="required", max_tokens=150
    )
    called = first.choices[0].message
    (call,) = called.tool_calls or []
    messages += [
        called.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "sunny", "celsius": 21}'},
    ]
    last = client.chat.completions.create(
        model="tools", messages=messages, tools=[TOOL], tool_choice="none", max_tokens=60
    )
    assert last.choices[0].message.content


def test_a_tool_call_is_streamed(client: openai.OpenAI) -> None:
    parts = client.chat.completions.create(
        model="tools",
        messages=ASK,
        tools=[TOOL],
        tool_choice="required",
        max_tokens=150,
        stream=True,
    )
    calls = [c for p in parts if p.choices for c in p.choices[0].delta.tool_calls or []]
    assert calls[0].function is not None and calls[0].function.name == "get_weather"
    json.loads("".join((c.function.arguments or "") for c in calls if c.function))


def test_tools_go_to_the_slm_that_has_them_and_a_pinned_one_says_what_is_missing(
    fleet: ServedFleet,
) -> None:
    auto = {"model": "auto", "messages": ASK, "tools": [TOOL], "max_tokens": 30}
    assert fleet.post("/v1/chat/completions", auto).headers["x-calm-model"] == "tools"
    error = fleet.post("/v1/chat/completions", {**auto, "model": "smollm2"})
    assert error.status_code == 400
    message = error.json()["error"]["message"]
    assert "tools" in message and "smollm2" in message and "capabilities" in message


def test_an_answer_follows_the_clients_schema(client: openai.OpenAI) -> None:
    schema = {"name": "city", "schema": WEATHER["parameters"]}
    shape: Any = {"type": "json_schema", "json_schema": schema}
    answer = client.chat.completions.create(
        model="smollm2",
        messages=ASK,
        response_format=shape,
        max_tokens=60,
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}


def test_a_prompt_that_is_too_long_names_both_numbers(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="smollm2", messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in str(caught.value)


def similarity(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_vectors_of_paraphrases_are_near(client: openai.OpenAI, fleet: ServedFleet) -> None:
    found = client.embeddings.create(model="auto", input=RELATED, encoding_format="float")
    one, same, unrelated = (row.embedding for row in found.data)
    assert similarity(one, same) > 0.8 > 0.3 > similarity(one, unrelated)
    answer = fleet.post("/v1/embeddings", {"model": "auto", "input": RELATED})
    assert answer.headers["x-calm-model"] == "minilm"
    facts = fleet.outcome(answer.headers["x-calm-decision-id"]).engine
    assert facts.prompt_tokens == answer.json()["usage"]["prompt_tokens"]


def test_chats_and_vectors_never_mix(fleet: ServedFleet) -> None:
    embed = fleet.post("/v1/embeddings", {"model": "smollm2", "input": "x"})
    chat = fleet.post("/v1/chat/completions", {"model": "minilm", "messages": ASK})
    assert (embed.status_code, chat.status_code) == (400, 400)
    assert "minilm" not in fleet.route("hello")["candidates"]


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/sleep", "/reset_prefix_cache", "/collective_rpc", "/pause"]
)
def test_nothing_that_controls_an_engine_is_reachable(fleet: ServedFleet, path: str) -> None:
    assert fleet.post(path, {"model": "smollm2"}).status_code == 404


def test_an_embedder_that_dies_is_not_replaced_by_one_of_another_space(
    fleet: ServedFleet,
) -> None:
    (pid,) = fleet.engine_pids("minilm")
    os.kill(pid, signal.SIGKILL)
    statuses = set()
    for _ in range(8):
        answer = fleet.post("/v1/embeddings", {"model": "auto", "input": "x"})
        statuses.add(answer.status_code)
        assert answer.headers["x-calm-model"] in ("", "minilm")
    assert statuses <= {200, 500, 502, 503} and statuses != {200}
    named = fleet.post("/v1/embeddings", {"model": "other", "input": "x"})
    assert named.headers["x-calm-model"] == "other"

    def back() -> bool:
        return fleet.post("/v1/embeddings", {"input": "x"}).status_code == 200

    eventually("the embedder answers again", back, timeout_s=120.0)
