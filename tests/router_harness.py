"""A router deployment without Ray: scripted SLMs, and a list of everything that it records."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from calm_serve.config import ServeArgs
from calm_serve.protocol.reports import DemandReply, DemandReport
from calm_serve.testing import make_fleet
from calm_serve.types import Outcome
from deployments.router import deployment


class Answer:
    """A reply: an iterator that can be cancelled."""

    def __init__(self, slms: SLMs, items: AsyncIterator[Any]) -> None:
        self._slms, self._items = slms, items

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        self._slms.cancelled += 1


class SLMs:
    """Takes the place of the connections to the SLMs: every call plays the same items."""

    def __init__(self, *items: Any) -> None:
        self._items = items
        self.cancelled = 0

    def call(self, *_request: Any) -> Answer:
        return Answer(self, self.play())

    def replica_failed(self, replica_id: str) -> None:
        """Nothing is open."""

    async def close(self) -> None:
        """Nothing is open."""

    async def play(self) -> AsyncIterator[Any]:
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            if item == "hang":
                await asyncio.Event().wait()
            yield item


class Handle:
    """A handle that has started."""

    is_initialized = True


class Knowledge:
    """A knowledge client that keeps what it is sent."""

    reachable = True
    waits: dict[str, float] = {}

    def __init__(self, *_args: Any) -> None:
        self.rows: list[Outcome] = []

    async def log(self, rows: Sequence[Outcome]) -> None:
        self.rows += rows

    async def set_residency(self, options: Any, *_weights: float) -> None:
        self.residency = options

    async def report_demand(self, _router: str, _report: DemandReport) -> DemandReply:
        return DemandReply(dict(self.waits))

    async def follow(self, *_args: Any) -> None:
        await asyncio.Event().wait()

    async def outcome(self, _outcome_id: str) -> None:
        return None


class Metrics:
    """Router metrics without Ray."""

    def __init__(self, *_args: Any) -> None:
        self.seen: list[Outcome] = []
        self.turned_away: list[str] = []

    def observe(self, outcome: Outcome) -> None:
        self.seen.append(outcome)

    def refused(self, kind: str) -> None:
        self.turned_away.append(kind)

    def refresh(self, *_args: Any) -> None:
        """Nothing to show."""


class PlainRouter(deployment.Router):
    """A router with scripted SLMs. Serve awaits `__del__`; the interpreter cannot."""

    slms: SLMs

    def connect_upstream(self, _random: Any) -> Any:
        return self.slms

    def __del__(self) -> None:  # type: ignore[override]
        """Closed by `Service` already."""


class Service:
    """A started router and its outcomes."""

    def __init__(self, folder: Path, *items: Any, **options: Any) -> None:
        self._args = ServeArgs.model_validate(
            {
                "fleet": "inline",
                "goals": {"exploration_ratio": 0.0},
                "learning": {"state_dir": str(folder)},
                "router": options,
            }
        )
        self.slms = SLMs(*items)
        self.router: Any = PlainRouter.__new__(PlainRouter)
        self.router.slms = self.slms

    async def __aenter__(self) -> Service:
        handles = {"small": Handle(), "large": Handle()}
        await self.router.__init__(self._args, make_fleet(), "calm", handles)
        return self

    async def __aexit__(self, *_: object) -> None:
        await deployment.Router.__del__(self.router)

    async def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Response:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", path, raw, headers)

    async def request(
        self, method: str, path: str, raw: bytes = b"", headers: dict[str, str] | None = None
    ) -> Response:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        response: Response = await self.router(Request(scope, receive))
        return response

    async def outcomes(self) -> list[Outcome]:
        await self.router._outcomes.stop()
        rows: list[Outcome] = self.router._knowledge.rows
        assert rows == self.router._metrics.seen
        return rows
