"""Pydantic AI, with its models for both of OpenAI's chat APIs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, Embedder, ModelHTTPError, NativeOutput, Tool, ToolOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.exceptions import ModelContextWindowExceededError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PARIS = "What is the capital of France? Answer in one sentence."
ASK = "What is the weather in Paris?"


class City(BaseModel):
    """A city. Its grammar is finite: so small a model does not end a text by itself."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Berlin", "Paris", "Rome"]


@pytest.fixture
def provider(url: str) -> OpenAIProvider:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
    return OpenAIProvider(openai_client=client)


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def agent(request: pytest.FixtureRequest, provider: OpenAIProvider) -> Callable[..., Agent]:
    """Makes an agent of a model's name."""

    def make(name: str, **options: Any) -> Agent:
        model = request.param(name, provider=provider)
        return Agent(model, model_settings={"max_tokens": 60}, retries=0, **options)

    return make


async def test_a_chat_is_answered_plain_and_streamed(agent: Any) -> None:
    chat = agent("smollm2")
    whole = await chat.run(PARIS)
    assert "Paris" in whole.output and whole.usage.output_tokens > 1
    async with chat.run_stream(PARIS) as stream:
        parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
    assert len(parts) > 3 and "".join(parts) == whole.output


@pytest.mark.parametrize("form", [NativeOutput, partial(ToolOutput, strict=True)])
async def test_structured_output_is_an_object(agent: Any, form: Any) -> None:
    chat = agent("tools", output_type=form(City))
    assert isinstance((await chat.run(ASK)).output, City)
    async with chat.run_stream(ASK) as stream:
        assert isinstance(await stream.get_output(), City)


async def test_a_whole_tool_loop_ends_with_an_object(agent: Any) -> None:
    called: list[str] = []

    def get_weather(city: Literal["Berlin", "Paris", "Rome"]) -> str:
        """Weather of a city."""
        called.append(city)
        return f"It is sunny in {city}, 21 degrees."

    def until_called(_context: Any, tool: Any) -> Any:
        # So small a model would call it again and again.
        return None if called else tool

    once = Tool(get_weather, prepare=until_called)
    chat = agent("tools", tools=[once], output_type=ToolOutput(City, name="answer"))
    found = await chat.run(ASK)
    assert isinstance(found.output, City) and len(called) == 1


async def test_texts_have_vectors(provider: OpenAIProvider) -> None:
    embedder = Embedder(OpenAIEmbeddingModel("minilm", provider=provider))
    found = await embedder.embed_documents(["A man eats.", "The market fell."])
    assert [len(vector) for vector in found.embeddings] == [384, 384]


async def test_errors_have_the_services_words(agent: Any) -> None:
    for words in (3_000, 20_000):
        with pytest.raises(ModelContextWindowExceededError, match="2048"):
            await agent("smollm2").run("word " * words)
    with pytest.raises(ModelHTTPError, match="absent") as caught:
        await agent("absent").run(ASK)
    assert caught.value.status_code == 404
