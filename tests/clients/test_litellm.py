"""LiteLLM's SDK, as a client of an OpenAI-compatible server and of one that it knows as vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel, ConfigDict

PARIS: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PROVIDERS = ("openai", "hosted_vllm")


class City(BaseModel):
    """A city. Its grammar is finite: so small a model does not end a text by itself."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Berlin", "Paris", "Rome"]


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": City.model_json_schema(),
        "strict": True,
    },
}


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def target(url: str) -> dict[str, Any]:
    """Where the requests go; without LiteLLM's own retries."""
    return {"api_base": f"{url}/v1", "api_key": "unused", "num_retries": 0, "max_retries": 0}


@pytest.fixture
def complete(target: dict[str, Any]) -> Callable[..., Any]:
    return partial(litellm.completion, **target, max_tokens=60, timeout=60)


def test_a_chat_is_answered_plain_and_streamed(complete: Any, provider: str) -> None:
    model = f"{provider}/smollm2"
    whole = complete(model=model, messages=PARIS)
    text = whole.choices[0].message.content
    assert "Paris" in text and whole.usage.completion_tokens > 1
    parts = list(
        complete(model=model, messages=PARIS, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == text
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert litellm.stream_chunk_builder(parts).choices[0].finish_reason == "stop"


async def test_a_chat_is_answered_and_streamed_in_an_event_loop(
    target: dict[str, Any], provider: str
) -> None:
    model = f"{provider}/smollm2"
    whole = await litellm.acompletion(model=model, messages=PARIS, max_tokens=60, **target)
    stream = await litellm.acompletion(
        model=model, messages=PARIS, max_tokens=60, stream=True, **target
    )
    text = "".join([p.choices[0].delta.content or "" async for p in stream])
    assert text == whole.choices[0].message.content


def test_the_service_chooses_where_the_model_is_auto(complete: Any, provider: str) -> None:
    answer = complete(model=f"{provider}/auto", messages=PARIS)
    assert answer.choices[0].message.content
    # LiteLLM keeps the headers that a service adds.
    assert answer._hidden_params["additional_headers"]["llm_provider-x-calm-model"]


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
def test_a_whole_tool_loop_ends_with_an_answer(
    complete: Any, provider: str, choice: Any, streamed: bool
) -> None:
    ask = partial(complete, model=f"{provider}/tools", tools=[TOOL])
    first = ask(messages=ASK, tool_choice=choice, stream=streamed)
    if streamed:
        first = litellm.stream_chunk_builder(list(first))
    called = first.choices[0].message
    (call,) = called.tool_calls
    assert call.function.name == "get_weather"
    City.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "sunny"}'}
    last = ask(messages=[*ASK, called.model_dump(exclude_none=True), result], tool_choice="none")
    assert last.choices[0].message.content


def test_an_answer_follows_the_clients_schema(complete: Any, provider: str) -> None:
    ask = partial(complete, model=f"{provider}/tools", messages=ASK, response_format=City)
    City.model_validate_json(ask().choices[0].message.content)
    parts = ask(stream=True)
    City.model_validate_json("".join(p.choices[0].delta.content or "" for p in parts))


def test_texts_have_vectors(target: dict[str, Any], provider: str) -> None:
    texts = ["A man eats.", "The market fell."]
    found = litellm.embedding(model=f"{provider}/minilm", input=texts, **target)
    assert [len(row["embedding"]) for row in found.data] == [384, 384]
    assert found.usage.prompt_tokens > 5


def test_a_text_is_completed(target: dict[str, Any]) -> None:
    ask = partial(litellm.text_completion, model="text-completion-openai/smollm2", **target)
    whole = ask(prompt="One, two, three,", max_tokens=8)
    parts = ask(prompt="One, two, three,", max_tokens=8, stream=True)
    assert "four" in whole.choices[0].text
    assert "".join(p.choices[0].text or "" for p in parts) == whole.choices[0].text


def test_responses_are_answered_plain_and_streamed(target: dict[str, Any]) -> None:
    ask = partial(
        litellm.responses,
        model="openai/smollm2",
        input=PARIS[0]["content"],
        max_output_tokens=30,
        **target,
    )
    whole = ask()
    assert "Paris" in json.dumps(whole.model_dump()["output"])
    events = list(ask(stream=True))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert "Paris" in text and events[-1].type == "response.completed"


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
# The first is for an engine to count; the second is refused before it reaches one.
@pytest.mark.parametrize("words", [3_000, 20_000])
def test_a_prompt_that_is_too_long_is_an_error_of_its_own(
    complete: Any, provider: str, streamed: bool, words: int
) -> None:
    long = [{"role": "user", "content": "word " * words}]
    with pytest.raises(litellm.ContextWindowExceededError, match="2048"):
        list(complete(model=f"{provider}/smollm2", messages=long, stream=streamed))


def test_errors_have_their_classes(complete: Any, provider: str) -> None:
    with pytest.raises(litellm.NotFoundError):
        complete(model=f"{provider}/absent", messages=PARIS)
    with pytest.raises(litellm.BadRequestError, match="temperature") as caught:
        complete(model=f"{provider}/smollm2", messages=PARIS, temperature=-1)
    assert not isinstance(caught.value, litellm.ContextWindowExceededError)
    with pytest.raises(litellm.BadRequestError, match="capabilities"):
        complete(model=f"{provider}/smollm2", messages=ASK, tools=[TOOL])
