"""The AI SDK of npm (`ai`), through its providers for all three of the service's chat APIs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).with_name("ai_sdk")
SCRIPT_S = 100.0
CHATS = ("compatible", "openai-chat", "openai-responses", "anthropic")
CITIES = ("Berlin", "Paris", "Rome")


def run(script: str, url: str, provider: str) -> Any:
    """Run a script of `ai_sdk/` and return the JSON document that it prints."""
    node = shutil.which("node")
    assert node, "Node.js is not installed: the AI SDK's tests need `node` and `npm`, 20 or newer"
    assert (SCRIPTS / "node_modules").is_dir(), "the AI SDK is not installed: run `make clients`"
    done = subprocess.run(
        [node, SCRIPTS / script, url, provider], capture_output=True, text=True, timeout=SCRIPT_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("provider", CHATS)
def test_a_chat_is_answered_plain_and_streamed(url: str, provider: str) -> None:
    found = run("plain.mjs", url, provider)
    assert "Paris" in found["text"]
    assert "".join(found["deltas"]) == found["text"]
    assert len(found["deltas"]) > 3
    assert found["finishReason"] == found["streamedFinishReason"] == "stop"
    assert found["outputTokens"] == found["streamedOutputTokens"] > 1


@pytest.mark.parametrize("provider", CHATS)
def test_a_whole_tool_loop_ends_with_an_answer(url: str, provider: str) -> None:
    found = run("tools.mjs", url, provider)
    for called, answered in (found["whole"], found["streamed"]):
        (call,) = called["calls"]
        assert call["toolName"] == "get_weather" and not call.get("invalid")
        assert call["input"]["city"] in CITIES
        assert called["results"][0]["sky"] == "sunny"
        assert answered["text"] and not answered["calls"]


@pytest.mark.parametrize("provider", CHATS)
def test_structured_output_is_an_object(url: str, provider: str) -> None:
    found = run("structured.mjs", url, provider)
    assert found["whole"]["city"] in CITIES
    assert found["streamed"] == found["last"] == found["whole"]


@pytest.mark.parametrize("provider", ["compatible", "openai"])
def test_texts_have_vectors(url: str, provider: str) -> None:
    found = run("embed.mjs", url, provider)
    assert found["dimensions"] == [384] * 3
    assert found["same"] > 0.99 > found["near"] > 0.8 > 0.3 > found["far"]
    assert found["tokens"] > 10


@pytest.mark.parametrize("provider", CHATS)
def test_errors_say_what_is_wrong_and_that_repeating_does_not_help(url: str, provider: str) -> None:
    found = run("errors.mjs", url, provider)
    for error in (found["whole"], found["streamed"]):
        assert error["name"] == "AI_APICallError" and error["status"] == 400
        assert not error["retryable"]
        assert "2048" in error["message"]
    assert found["unknown"]["status"] == 404 and "absent" in found["unknown"]["message"]
