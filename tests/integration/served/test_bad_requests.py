"""A wrong request is answered with the right status in OpenAI's format, and disturbs no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.served_fleet import ServedFleet

MESSAGES = [{"role": "user", "content": "list all files"}]
CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "shell", "messages": MESSAGES, "max_tokens": 2}


@pytest.fixture(autouse=True)
def good_requests_still_work(fleet: ServedFleet) -> Iterator[None]:
    """After each wrong request a good one is answered; `at_rest` sees that nothing still runs."""
    yield
    assert fleet.post(CHAT, GOOD).status_code == 200


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        pytest.param({"model": "nobody"}, 404, "model", id="unknown model"),
        pytest.param({"model": "shell:nobody"}, 404, "model", id="unknown adapter"),
        pytest.param({"model": 5}, 400, "model", id="model is a number"),
        pytest.param({"messages": []}, 400, "messages", id="no messages"),
        pytest.param({"messages": "hello"}, 400, "messages", id="messages is a string"),
        pytest.param({"stream": "yes"}, 400, "stream", id="stream is a string"),
        pytest.param({"max_tokens": 0}, 400, "max_tokens", id="no tokens"),
        pytest.param({"max_tokens": "many"}, 400, "max_tokens", id="max_tokens is a string"),
        pytest.param({"temperature": "hot"}, 400, "temperature", id="temperature is a string"),
        pytest.param({"temperature": -1}, 400, "temperature", id="negative temperature"),
        pytest.param({"response_format": {"type": "xml"}}, 400, "response_format", id="format"),
    ],
)
def test_a_wrong_field_is_named(
    fleet: ServedFleet, change: dict[str, Any], status: int, param: str
) -> None:
    error = error_of(fleet.post(CHAT, GOOD | change), status)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"logit_bias": {"99999999": 1}}], ids=["early", "late"]
)
def test_a_wrong_field_of_a_stream_is_refused_by_its_status(
    fleet: ServedFleet, wrong: dict[str, Any]
) -> None:
    """vLLM finds some mistakes only after it has sent the status line of a stream."""
    before = fleet.slm(str(GOOD["model"]))["failures"]
    answer = fleet.post(CHAT, GOOD | {"stream": True} | wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert fleet.slm(str(GOOD["model"]))["failures"] == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", [3_000, 100_000])
def test_a_prompt_beyond_the_context_length_is_refused(
    fleet: ServedFleet, stream: bool, words: int
) -> None:
    body = GOOD | {"messages": [{"role": "user", "content": "word " * words}], "stream": stream}
    error = error_of(fleet.post(CHAT, body), 400)
    assert "context" in error["message"]


def test_a_body_over_the_limit_is_refused_with_413(fleet: ServedFleet) -> None:
    body = GOOD | {"messages": [{"role": "user", "content": "x" * (5 << 20)}]}
    assert "bytes" in error_of(fleet.post(CHAT, body), 413)["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"a": NaN'])
def test_a_body_that_is_no_json_object_is_refused(fleet: ServedFleet, content: bytes) -> None:
    answer = httpx.post(fleet.url + CHAT, content=content, timeout=60.0)
    assert error_of(answer, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-calm-qualityfloor", "0.5"),
        ("x-calm-quality-floor", "high"),
        ("x-calm-quality-floor", "1.5"),
        ("x-calm-data-policy", "moon"),
        ("x-calm-validate", "taste"),
        ("x-slo-ttft-ms", "soon"),
    ],
)
def test_a_wrong_routing_header_is_named(fleet: ServedFleet, header: str, value: str) -> None:
    error = error_of(fleet.post(CHAT, GOOD, {header: value}), 400)
    assert error["param"] == header


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/decisions/never", 404),
    ],
)
def test_a_wrong_path_or_method_is_refused(
    fleet: ServedFleet, method: str, path: str, status: int
) -> None:
    error_of(httpx.request(method, fleet.url + path, timeout=60.0), status)


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"decision_id": "x"},
        {"decision_id": "x", "score": 2},
        {"decision_id": "x", "rating": 1},
    ],
)
def test_wrong_feedback_is_refused(fleet: ServedFleet, body: Any) -> None:
    error_of(fleet.post("/v1/feedback", body), 400)


def test_wrong_requests_are_refused_by_the_dry_run_too(fleet: ServedFleet) -> None:
    error_of(fleet.post("/v1/route", {"messages": []}), 400)
    error_of(fleet.post("/v1/route", {"model": "nobody", "messages": MESSAGES}), 404)
