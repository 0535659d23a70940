"""LangChain, through its integrations of the APIs of OpenAI and of Anthropic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError, ModelNotFoundError
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict

PARIS = "What is the capital of France? Answer in one sentence."
ASK = "What is the weather in Paris?"
# The first is for an engine to count; the second is refused before it reaches one.
TOO_LONG = pytest.mark.parametrize("words", [3_000, 20_000])
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


class City(BaseModel):
    """A city. Its grammar is finite: so small a model does not end a text by itself."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Berlin", "Paris", "Rome"]


def _weather(city: str) -> str:
    return f"It is sunny in {city}, 21 degrees."


get_weather = StructuredTool.from_function(
    _weather, name="get_weather", description="Weather of a city.", args_schema=City
)


@pytest.fixture
def chat(url: str) -> Callable[..., ChatOpenAI]:
    return partial(
        ChatOpenAI, base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60, max_tokens=60
    )


@pytest.fixture
def claude(url: str) -> Callable[..., ChatAnthropic]:
    return partial(
        ChatAnthropic, base_url=url, api_key="unused", max_retries=0, timeout=60, max_tokens=60
    )


@pytest.mark.parametrize("responses_api", [False, True], ids=["chat", "responses"])
def test_a_chat_is_answered_plain_and_streamed(chat: Any, responses_api: bool) -> None:
    # LangChain asks for the usage of a stream by itself only where the server is OpenAI's.
    model = chat(model="smollm2", use_responses_api=responses_api, stream_usage=True)
    whole = model.invoke(PARIS)
    assert "Paris" in whole.text
    assert whole.usage_metadata["output_tokens"] > 1
    chunks = list(model.stream(PARIS))
    assert len(chunks) > 3
    joined = sum(chunks[1:], chunks[0])
    assert isinstance(joined, AIMessageChunk) and joined.text == whole.text
    assert joined.usage_metadata == whole.usage_metadata


async def test_chats_run_side_by_side(chat: Any) -> None:
    answers = await chat(model="smollm2").abatch([PARIS] * 4)
    assert all("Paris" in a.text for a in answers)
    parts = [c.text async for c in chat(model="smollm2").astream(PARIS)]
    assert "".join(parts) == answers[0].text


def test_the_service_chooses_where_the_model_is_auto(chat: Any) -> None:
    answer = chat(model="auto").invoke(PARIS)
    assert answer.text and answer.response_metadata["model_name"]


@STREAMED
@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_whole_tool_loop_ends_with_an_answer(chat: Any, choice: str, streamed: bool) -> None:
    model = chat(model="tools")
    asked = [HumanMessage(ASK)]
    must_call = model.bind_tools([get_weather], tool_choice=choice, strict=True)
    if streamed:
        chunks = list(must_call.stream(asked))
        called: Any = sum(chunks[1:], chunks[0])
    else:
        called = must_call.invoke(asked)
    (call,) = called.tool_calls
    assert call["name"] == "get_weather" and not called.invalid_tool_calls
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage) and "sunny" in result.text
    may_not_call = model.bind_tools([get_weather], tool_choice="none")
    assert may_not_call.invoke([*asked, called, result]).text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object(chat: Any, method: str) -> None:
    model = chat(model="tools").with_structured_output(City, method=method, strict=True)
    assert isinstance(model.invoke(ASK), City)


def test_structured_output_is_streamed(chat: Any) -> None:
    model = chat(model="tools").with_structured_output(City, method="json_schema", strict=True)
    assert isinstance(list(model.stream(ASK))[-1], City)


def test_texts_have_vectors(url: str) -> None:
    vectors = OpenAIEmbeddings(
        model="minilm",
        base_url=f"{url}/v1",
        api_key="unused",
        # LangChain's manual asks for this with servers other than OpenAI's own: without it, texts
        # are sent as token ids of OpenAI's tokenizer.
        check_embedding_ctx_length=False,
    )
    rows = vectors.embed_documents(["A man eats.", "The market fell."])
    assert [len(r) for r in rows] == [384, 384]
    assert vectors.embed_query("A man eats.") == pytest.approx(rows[0], abs=1e-3)


@STREAMED
@TOO_LONG
@pytest.mark.parametrize("responses_api", [False, True], ids=["chat", "responses"])
def test_a_prompt_that_is_too_long_is_an_error_of_its_own(
    chat: Any, streamed: bool, responses_api: bool, words: int
) -> None:
    model = chat(model="smollm2", use_responses_api=responses_api)
    with pytest.raises(ContextOverflowError, match="2048"):
        list(model.stream("word " * words)) if streamed else model.invoke("word " * words)


def test_an_unknown_model_is_an_error_of_its_own(chat: Any) -> None:
    with pytest.raises(ModelNotFoundError):
        chat(model="absent").invoke(PARIS)


def test_messages_are_answered_plain_and_streamed(claude: Any) -> None:
    model = claude(model="smollm2")
    whole = model.invoke(PARIS)
    assert "Paris" in whole.text and whole.usage_metadata["output_tokens"] > 1
    assert "".join(c.text for c in model.stream(PARIS)) == whole.text


def test_a_tool_loop_runs_over_messages(claude: Any) -> None:
    model = claude(model="tools")
    asked = [HumanMessage(ASK)]
    called = model.bind_tools([get_weather], tool_choice="any").invoke(asked)
    (call,) = called.tool_calls
    assert call["name"] == "get_weather"
    result = get_weather.invoke(call)
    may_not_call = model.bind_tools([get_weather], tool_choice={"type": "none"})
    assert may_not_call.invoke([*asked, called, result]).text


def test_structured_output_of_messages_is_an_object(claude: Any) -> None:
    assert isinstance(claude(model="tools").with_structured_output(City).invoke(ASK), City)


@STREAMED
@TOO_LONG
def test_a_message_that_is_too_long_is_an_error_of_its_own(
    claude: Any, streamed: bool, words: int
) -> None:
    model = claude(model="smollm2")
    with pytest.raises(ContextOverflowError, match="2048"):
        list(model.stream("word " * words)) if streamed else model.invoke("word " * words)
