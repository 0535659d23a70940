"""`/v1/predictors`: valid requests, and the knowledge actor's answer."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from starlette.requests import Request

from calm_serve.errors import RequestError
from deployments.router.admin.predictors import PredictorsEndpoint


class Knowledge:
    """A knowledge client that keeps the requested change."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def predictors(self) -> dict[str, Any]:
        return {"object": "list", "data": [], "pinned": ""}

    async def change_predictor(self, action: str, version: str) -> dict[str, Any]:
        self.asked.append((action, version))
        return {"object": "list", "data": [], "pinned": version}


def posted(body: Any) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def endpoint() -> tuple[PredictorsEndpoint, Knowledge]:
    knowledge = Knowledge()
    return PredictorsEndpoint(cast(Any, knowledge)), knowledge


async def test_the_list_is_the_actors() -> None:
    response = await endpoint()[0].get(cast(Any, None))
    assert json.loads(bytes(response.body)) == {"object": "list", "data": [], "pinned": ""}


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"action": "pin", "version": "lgbm-1"}, ("pin", "lgbm-1")),
        ({"action": "unpin"}, ("unpin", "")),
        ({"action": "rollback"}, ("rollback", "")),
    ],
)
async def test_an_action_reaches_the_actor(body: Any, asked: tuple[str, str]) -> None:
    predictors, knowledge = endpoint()
    response = await predictors.post(posted(body))
    assert knowledge.asked == [asked]
    assert json.loads(bytes(response.body))["pinned"] == asked[1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "JSON object"),
        ({"action": "pin"}, "required to pin"),
        ({"action": "rollback", "version": "lgbm-1"}, "required to pin"),
        ({"action": 3}, "strings"),
        ({"action": "pin", "verson": "lgbm-1"}, "unknown key 'verson'"),
    ],
)
async def test_a_malformed_action_is_refused(body: Any, message: str) -> None:
    predictors, knowledge = endpoint()
    with pytest.raises(RequestError, match=message):
        await predictors.post(posted(body))
    assert knowledge.asked == []
