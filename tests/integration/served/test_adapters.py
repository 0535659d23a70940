"""LoRA adapters: pinned by name, really used, one in memory, never pulled from a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from tests.integration.served_fleet import ServedFleet, eventually

SONG = "play the song yesterday by the beatles"


@pytest.fixture(scope="module")
def answers(client: OpenAI) -> dict[str, str]:
    """The answers of the base model and of both adapters to one prompt, at temperature 0."""
    return {name: ask(client, name) for name in ("extract", "extract:flat", "extract:music")}


def ask(client: OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": SONG}], temperature=0, max_tokens=160
    )
    return answer.choices[0].message.content or ""


def test_each_adapter_answers_differently_from_its_base(answers: dict[str, str]) -> None:
    assert len(set(answers.values())) == 3


def test_each_adapter_answers_in_the_format_it_was_trained_for(answers: dict[str, str]) -> None:
    assert set(json.loads(answers["extract"])) == {"intent", "slots"}
    assert "task" in json.loads(answers["extract:flat"])
    assert set(json.loads(answers["extract:music"])) == {"action", "music"}


def test_an_adapter_answers_the_same_after_it_was_evicted_and_loaded_again(
    client: OpenAI, answers: dict[str, str]
) -> None:
    for name in ("extract:music", "extract:flat", "extract", "extract:music"):
        assert ask(client, name) == answers[name]


def test_the_last_used_adapter_is_the_resident_one(fleet: ServedFleet) -> None:
    for name in ("flat", "music"):
        answer = fleet.chat(SONG, f"extract:{name}", max_tokens=2)
        assert answer.status_code == 200
        assert fleet.outcome(answer.headers["x-calm-decision-id"]).adapter == name
        eventually(
            f"only {name} is resident",
            lambda name=name: fleet.slm("extract")["resident_adapters"] == [name],  # type: ignore[misc]
        )


def test_an_adapter_with_a_running_request_is_not_unloaded(
    client: OpenAI, answers: dict[str, str]
) -> None:
    def long_stream() -> Iterator[str]:
        stream = client.chat.completions.create(
            model="extract:flat",
            messages=[{"role": "user", "content": SONG}],
            temperature=0,
            max_tokens=500,
            stream=True,
            extra_body={"min_tokens": 500, "ignore_eos": True},
        )
        yield from (e.choices[0].delta.content or "" for e in stream if e.choices)

    running = long_stream()
    next(running)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, client, "extract:music")
        rest = list(running)
        assert other.result() == answers["extract:music"]
    assert len(rest) > 300  # it went on to its end
    alone = list(long_stream())
    assert "".join(rest)[:400] == "".join(alone[1:])[:400]


def test_an_unknown_adapter_is_not_found(fleet: ServedFleet) -> None:
    answer = fleet.chat(SONG, "extract:nobody")
    assert answer.status_code == 404
    assert "extract:flat" in answer.json()["error"]["message"]
