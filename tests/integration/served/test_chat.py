"""The endpoint is OpenAI's API: answers, streams, options, errors, by the official client."""

from __future__ import annotations

import json

import openai
import pytest
from openai import OpenAI

from tests.integration.served_fleet import ServedFleet

SONG = "Extract intent and slots as JSON: play some jazz by Miles Davis"
CALM_HEADERS = ("x-calm-model", "x-calm-decision-id", "x-calm-reason")


def user(text: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_a_plain_answer_has_text_usage_and_a_finish_reason(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="extract", messages=user(SONG), temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == "extract"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_same_answer_can_be_streamed(client: OpenAI) -> None:
    options = {"model": "extract", "messages": user(SONG), "temperature": 0}
    plain = client.chat.completions.create(**options)  # type: ignore[call-overload]
    events = list(client.chat.completions.create(**options, stream=True))  # type: ignore[call-overload]
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert len(events) > 3
    assert text == plain.choices[0].message.content
    assert events[-1].choices[0].finish_reason == "stop"


def test_a_stream_is_server_sent_events_that_end_with_done(fleet: ServedFleet) -> None:
    answer = fleet.chat(SONG, "extract", stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert all(e.startswith("data: ") for e in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["usage"]["completion_tokens"] > 0


def test_every_response_names_its_slm_the_reason_and_the_decision(fleet: ServedFleet) -> None:
    auto, pinned, streamed = (
        fleet.chat(SONG, max_tokens=4),
        fleet.chat(SONG, "sql", max_tokens=4),
        fleet.chat(SONG, "shell", max_tokens=4, stream=True),
    )
    assert auto.headers["x-calm-model"] == "extract"
    assert auto.headers["x-calm-reason"] == "rule:rule_match:names-slots"
    assert pinned.headers["x-calm-model"] == "sql"
    assert pinned.headers["x-calm-reason"] == "pinned:requested"
    assert streamed.headers["x-calm-model"] == "shell"
    ids = {a.headers["x-calm-decision-id"] for a in (auto, pinned, streamed)}
    assert len(ids) == 3


def test_refused_requests_carry_the_headers_too(fleet: ServedFleet) -> None:
    early = fleet.chat("hi", "nobody")  # refused by the router
    late = fleet.chat("hi", "sql", temperature=-1)  # refused by the engine
    for answer, status in ((early, 404), (late, 400)):
        assert answer.status_code == status
        assert all(name in answer.headers for name in CALM_HEADERS)
        assert answer.headers["x-calm-decision-id"]


def test_wrong_requests_raise_the_clients_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=user("hi"))
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="sql", messages=user("hi"), temperature=-1)
    assert "temperature" in wrong.value.message


def test_the_model_list_is_the_fleet_with_its_adapters(client: OpenAI) -> None:
    names = {m.id for m in client.models.list()}
    slms = {"extract", "sql", "shell", "reason", "intent", "general", "embed"}
    assert names >= {"auto", *slms, "extract:flat", "extract:music"}
    assert client.models.retrieve("extract:music").id == "extract:music"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_text_completions_are_served_plain_and_streamed(client: OpenAI) -> None:
    options = {
        "model": "general",
        "prompt": "Once upon",
        "max_tokens": 8,
        "temperature": 0,
        "extra_body": {"min_tokens": 8},
    }
    plain = client.completions.create(**options)  # type: ignore[call-overload]
    events = client.completions.create(**options, stream=True)  # type: ignore[call-overload]
    assert plain.object == "text_completion"
    assert plain.usage.completion_tokens == 8
    assert "".join(e.choices[0].text for e in events) == plain.choices[0].text


def test_max_tokens_and_stop_end_an_answer(client: OpenAI) -> None:
    full = client.chat.completions.create(model="extract", messages=user(SONG), temperature=0)
    text = full.choices[0].message.content or ""
    short = client.chat.completions.create(
        model="extract", messages=user(SONG), temperature=0, max_tokens=3
    )
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None and short.usage.completion_tokens == 3
    stopped = client.chat.completions.create(
        model="extract", messages=user(SONG), temperature=0, stop=[text[5:8]]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == text[: text.index(text[5:8])]


def test_a_seed_makes_sampling_repeatable(client: OpenAI) -> None:
    def sample(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="general",
            messages=user("Tell me something"),
            temperature=1.5,
            seed=seed,
            max_tokens=24,
        )
        return answer.choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1


def test_several_choices_come_in_one_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="general", messages=user("Tell me something"), n=2, max_tokens=4, temperature=1.0
    )
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.usage is not None and answer.usage.completion_tokens <= 8


def test_log_probabilities_are_passed_on(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="extract",
        messages=user(SONG),
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 3
    assert all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in tokens)


def test_a_json_schema_constrains_the_answer_of_an_slm_that_would_not_follow_it(
    client: OpenAI,
) -> None:
    schema = {
        "type": "object",
        "properties": {"intent": {"enum": ["red", "green"]}},
        "required": ["intent"],
        "additionalProperties": False,
    }
    options = {
        "model": "intent",
        "messages": user("set an alarm for six"),
        "temperature": 0,
        "max_tokens": 64,
    }
    free = client.chat.completions.create(**options)  # type: ignore[call-overload]
    held = client.chat.completions.create(  # type: ignore[call-overload]
        **options,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )
    assert json.loads(held.choices[0].message.content)["intent"] in ("red", "green")
    assert json.loads(free.choices[0].message.content)["intent"] not in ("red", "green")
