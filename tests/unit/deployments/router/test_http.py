"""HTTP helpers: bodies, headers, errors."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from calm_serve.errors import (
    CalmError,
    CapacityError,
    ComponentError,
    NoCandidateError,
    RequestError,
    SLMUnavailableError,
    UnknownModelError,
)
from calm_serve.requests import ROUTES
from deployments.router.http import (
    TooLargeError,
    error_response,
    json_response,
    read_json,
    routing_headers,
    sse_error,
)


def request(*parts: bytes, **headers: str) -> Request:
    messages = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
        for i, part in enumerate(parts)
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    raw = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


async def test_a_body_in_parts_is_one_document() -> None:
    assert await read_json(request(b'{"a": ', b"[1, 2]}"), 100) == {"a": [1, 2]}


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress], ids=["gzip", "deflate"])
async def test_a_compressed_body_is_read(compress: Any) -> None:
    name = "gzip" if compress is gzip.compress else "deflate"
    assert await read_json(request(compress(b'{"a": 1}'), content_encoding=name), 100) == {"a": 1}


async def test_a_body_that_inflates_beyond_the_limit_is_too_large() -> None:
    bomb = gzip.compress(b'"' + b" " * 1_000_000 + b'"')
    with pytest.raises(TooLargeError):
        await read_json(request(bomb, content_encoding="gzip"), 5_000)


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (b"no gzip", "gzip", 400),
        (gzip.compress(b'{"a": 1}')[:-9], "gzip", 400),
        (b"{}", "br", 415),
    ],
    ids=["not compressed", "cut off", "unknown"],
)
async def test_a_body_that_cannot_be_inflated_is_refused(
    body: bytes, encoding: str, status: int
) -> None:
    with pytest.raises(RequestError) as caught:
        await read_json(request(body, content_encoding=encoding), 100)
    assert caught.value.http_status == status


async def test_a_byte_order_mark_is_passed_over() -> None:
    assert await read_json(request(b"\xef\xbb\xbf{}"), 100) == {}


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    assert await read_json(request(b'"1234"'), 6) == "1234"


@pytest.mark.parametrize(
    "too_large",
    [
        request(b'"12345"'),
        request(b'"123', b'45"'),
        request(b'"1"', content_length="7"),
    ],
    ids=["whole", "in parts", "declared"],
)
async def test_a_body_over_the_limit_is_refused_with_413(too_large: Request) -> None:
    with pytest.raises(TooLargeError) as caught:
        await read_json(too_large, 6)
    assert caught.value.http_status == 413


@pytest.mark.parametrize("declared", ["", "-1", "abc", "²", "9" * 5])
async def test_a_senseless_declared_length_does_not_break_the_request(declared: str) -> None:
    try:
        assert await read_json(request(b"{}", content_length=declared), 100) == {}
    except TooLargeError:
        assert declared == "99999"


@given(st.binary(max_size=60))
async def test_any_bytes_are_json_or_a_request_error(body: bytes) -> None:
    try:
        await read_json(request(body), 1000)
    except RequestError as error:
        assert error.http_status == 400


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 10_000, b'"\\ud800"'])
async def test_hostile_json_is_a_request_error(body: bytes) -> None:
    with pytest.raises(RequestError, match=r"not valid JSON|more than 50000 objects"):
        await read_json(request(body), 1 << 20)


def test_only_routing_headers_reach_the_decision() -> None:
    found = routing_headers(
        request(x_calm_task="t", x_slo_ttft_ms="5", x_session_id="s", authorization="secret")
    )
    assert found == {"x-calm-task": "t", "x-slo-ttft-ms": "5", "x-session-id": "s"}


def test_an_answer_is_json_with_its_headers() -> None:
    response = json_response({"a": "ü"}, 201, {"x-calm-model": "small"})
    assert (response.status_code, json.loads(bytes(response.body))) == (201, {"a": "ü"})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-calm-model"] == "small"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (RequestError("m", param="p"), 400, "invalid_request_error", None),
        (UnknownModelError("m", param="p"), 404, "invalid_request_error", "model_not_found"),
        (NoCandidateError("m", param="p"), 400, "invalid_request_error", "no_capable_model"),
        (ComponentError("m", param="p"), 503, "service_unavailable", None),
        (SLMUnavailableError("m", param="p"), 503, "service_unavailable", "model_unavailable"),
        (CalmError("m", param="p"), 500, "server_error", None),
    ],
)
def test_errors_have_the_openai_shape(
    error: CalmError, status: int, kind: str, code: str | None
) -> None:
    response = error_response(error)
    assert response.status_code == status
    assert json.loads(bytes(response.body)) == {
        "error": {"message": "m", "type": kind, "param": "p", "code": code}
    }
    assert "retry-after" not in response.headers


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (1.0, "1"), (2.1, "3")])
def test_a_full_fleet_gives_retry_after_in_whole_seconds(seconds: float, header: str) -> None:
    response = error_response(CapacityError("full", retry_after_s=seconds), {"x-a": "b"})
    assert response.status_code == 429
    assert (response.headers["retry-after"], response.headers["x-a"]) == (header, "b")


@pytest.mark.parametrize(
    ("path", "where"), [("/v1/messages", ("error", "message")), ("/v1/responses", ("message",))]
)
def test_an_error_in_a_stream_has_the_form_of_its_api(path: str, where: tuple[str, ...]) -> None:
    name, data, *_ = sse_error(SLMUnavailableError("gone"), ROUTES[path]).split(b"\n")
    found = json.loads(data.removeprefix(b"data: "))
    assert (name, found["type"]) == (b"event: error", "error")
    for key in where:
        found = found[key]
    assert found == "gone"


def test_an_error_in_a_stream_is_one_event() -> None:
    event = sse_error(SLMUnavailableError("line one\nline two"), ROUTES["/v1/completions"])
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[6:])["error"]["code"] == "model_unavailable"
