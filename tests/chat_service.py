"""A small chat service as an ASGI application: two SLMs that answer, one that embeds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]

FLEET: dict[str, Any] = {
    "slms": [
        {"id": "reader", "task": "generate"},
        {"id": "adder", "task": "generate"},
        {"id": "search", "task": "embed"},
    ]
}


class ChatService:
    """`adder` adds two numbers, `reader` knows a capital and grades answers.

    The first `busy` chat requests get 503. An SLM of `refusing` gets 400. Each answer takes
    `delay_turns` turns of the event loop.
    """

    def __init__(
        self,
        *,
        busy: int = 0,
        retry_after_s: float = 0.0,
        refusing: Sequence[str] = (),
        delay_turns: int = 0,
        fleet: Mapping[str, Any] = FLEET,
    ) -> None:
        self.asked: list[dict[str, Any]] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._busy, self._retry_after_s, self._refusing = busy, retry_after_s, tuple(refusing)
        self._delay_turns, self._fleet = delay_turns, fleet

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["path"] == "/v1/fleet":
            await self._reply(send, 200, self._fleet)
            return
        assert (scope["method"], scope["path"]) == ("POST", "/v1/chat/completions")
        body = json.loads((await receive())["body"])
        self.asked.append(body)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        for _ in range(self._delay_turns):
            await asyncio.sleep(0)
        self._in_flight -= 1
        if self._busy:
            self._busy -= 1
            await self._reply(send, 503, {"error": {"message": "queue is full"}})
        elif body["model"] in self._refusing:
            await self._reply(send, 400, {"error": {"message": "cannot take this"}})
        else:
            message = {"role": "assistant", "content": _answer(body)}
            await self._reply(send, 200, {"choices": [{"message": message}]})

    async def _reply(self, send: Send, status: int, document: Mapping[str, Any]) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"retry-after", str(self._retry_after_s).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(document).encode()})


def _answer(body: Mapping[str, Any]) -> str:
    text = str(body["messages"][-1]["content"])
    if body["model"] == "adder":
        first, plus, second = text.partition(" + ")
        numbers = first.isdigit() and second.isdigit()
        return str(int(first) + int(second)) if plus and numbers else "I cannot add that"
    if text.startswith("You grade"):
        return "Grade: 10" if "\n10\n" in text else "Grade: 2"
    return "It is Paris." if "France" in text else "I do not know."
