"""An engine answers once in each way before clients pay for it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from calm_serve.errors import ComponentError
from calm_serve.testing import make_spec
from deployments.slm.warm_up import warm_up


class Engine:
    """An engine that notes what it is asked."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.adapters: list[str] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.asked.append((scope["path"], json.loads(message["body"])))
        left = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        assert not left.done(), "vLLM would stop answering a client that has gone"
        left.cancel()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"no template"})

    async def load_adapter(self, name: str, _path: str) -> None:
        self.adapters.append(f"+{name}")

    async def unload_adapter(self, name: str) -> None:
        self.adapters.append(f"-{name}")


async def test_a_chat_model_answers_whole_and_streamed() -> None:
    engine = Engine()
    await warm_up(engine, make_spec("small"))
    assert [path for path, _ in engine.asked] == ["/v1/chat/completions"] * 2
    assert [body.get("stream", False) for _, body in engine.asked] == [False, True]


@pytest.mark.parametrize(
    ("about", "path"),
    [
        ({"task": "embed"}, "/v1/embeddings"),
        ({"task": "rerank"}, "/v1/rerank"),
        ({"capabilities": {"chat": False}}, "/v1/completions"),
    ],
    ids=["embeds", "ranks", "has no chat template"],
)
async def test_another_model_is_asked_what_it_can_do(about: dict[str, Any], path: str) -> None:
    engine = Engine()
    await warm_up(engine, make_spec("small", **about))
    assert {asked for asked, _ in engine.asked} == {path}


async def test_one_adapter_is_used_and_unloaded() -> None:
    engine = Engine()
    await warm_up(engine, make_spec("small", adapters=[{"name": "sql", "path": "x"}]))
    assert engine.adapters == ["+small:sql", "-small:sql"]
    assert engine.asked[-1][1]["model"] == "small:sql"


async def test_an_engine_that_does_not_answer_is_not_started() -> None:
    with pytest.raises(ComponentError, match="no template"):
        await warm_up(Engine(status=400), make_spec("small"))
