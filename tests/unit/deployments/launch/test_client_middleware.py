"""What every request passes before Serve: no steering of Serve, whole answers for HTTP/1.0."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.launch.client_middleware import ClientMiddleware, middlewares


async def passed(
    headers: list[tuple[bytes, bytes]], version: str = "1.1"
) -> tuple[Any, list[dict[str, Any]]]:
    """Send a request through; return the scope that Serve sees, and what the client gets."""
    seen: dict[str, Any] = {}
    sent: list[dict[str, Any]] = []

    async def serve(scope: Any, _receive: Any, send: Any) -> None:
        seen.update(scope)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    async def client(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": version, "headers": headers}
    await ClientMiddleware(serve)(scope, None, client)
    return seen, sent


@pytest.mark.parametrize(
    "name",
    [
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    ],
)
async def test_a_client_cannot_steer_serve(name: bytes) -> None:
    seen, _ = await passed([(b"x-request-id", b"1"), (name, b"?1")])
    assert seen["headers"] == [(b"x-request-id", b"1")]


async def test_answers_pass_as_they_come() -> None:
    _, sent = await passed([])
    assert [m.get("body") for m in sent] == [None, b"one ", b"two"]


async def test_an_http_1_0_client_gets_the_answer_in_one_piece_with_its_length() -> None:
    _, sent = await passed([], version="1.0")
    assert [m.get("body") for m in sent] == [None, b"one two"]
    assert sent[0]["headers"] == [(b"a", b"b"), (b"content-length", b"7")]


def test_serve_gets_one_middleware() -> None:
    assert [m.cls for m in middlewares()] == [ClientMiddleware]
