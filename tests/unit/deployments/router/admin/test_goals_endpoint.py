"""`/v1/goals`: showing, changing and refusing goals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from calm_serve.config import Goals
from calm_serve.errors import RequestError
from calm_serve.goals.controller import GoalController
from calm_serve.knowledge import goal_history
from calm_serve.protocol.topics import GoalChange
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import make_decision, make_fleet, make_goals, make_outcome
from deployments.observability.catalogue import BY_NAME
from deployments.observability.exporters import fleet_samples
from deployments.router.admin.goals import MAX_HISTORY, GoalsEndpoint, goals_section


class Knowledge:
    """Knowledge client and subscriptions in one: a change comes back at once, or not at all."""

    def __init__(self, selector: ModelSelector) -> None:
        self.selector = selector
        self.goals_change: GoalChange | None = None
        self.history: list[GoalChange] = []
        self.reachable = True

    async def set_goals(self, goals: Goals, by: str) -> GoalChange:
        change = GoalChange(5.0, by, None, {}, revision=len(self.history) + 1)
        self.history.insert(0, change)
        if self.reachable:
            self.goals_change = change
            self.selector.set_goals(goals)
        return change

    async def wait_for_goals(self, revision: int, timeout_s: float) -> bool:
        assert timeout_s > 0.0
        return self.goals_change is not None and self.goals_change.revision >= revision

    async def goal_changes(self, limit: int) -> tuple[GoalChange, ...]:
        return tuple(self.history[:limit])


def request(body: Any = None, query: str = "", **headers: str) -> Request:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": payload, "more_body": False}

    named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {
        "type": "http",
        "method": "PUT",
        "path": "/v1/goals",
        "query_string": query.encode(),
        "headers": named,
        "client": ("10.0.0.7", 1),
    }
    return Request(scope, receive)


def data(response: Response) -> Any:
    return json.loads(bytes(response.body))


@pytest.fixture
def selector() -> ModelSelector:
    return ModelSelector(make_fleet(), make_goals(), controller=GoalController(make_goals()))


@pytest.fixture
def knowledge(selector: ModelSelector) -> Knowledge:
    return Knowledge(selector)


@pytest.fixture
def endpoint(selector: ModelSelector, knowledge: Knowledge) -> GoalsEndpoint:
    return GoalsEndpoint(selector, knowledge, knowledge)


async def test_goals_weights_and_targets_are_shown(
    selector: ModelSelector, endpoint: GoalsEndpoint
) -> None:
    selector.set_goals(make_goals(ttft_p95_s=1.0, min_quality=0.9))
    selector.learn(make_decision("small", "large"), make_outcome(ttft_s=0.5))
    document = data(await endpoint.get(request()))
    assert document["goals"]["ttft_p95_s"] == 1.0
    assert document["weights"]["latency_per_s"] == selector.goals.latency_weight_per_s
    assert document["version"] == selector.versions.goals
    assert document["changed"] == {"at": None, "by": None, "revision": None}
    assert document["targets"] == [
        {
            "name": "ttft_p95_s",
            "target": 1.0,
            "measured": 0.5,
            "held": True,
            "feasible": None,
            "samples": 1,
        },
        {
            "name": "min_quality",
            "target": 0.9,
            "measured": 0.5,
            "held": False,
            "feasible": None,
            "samples": 1,
        },
    ]


async def test_a_put_replaces_all_goals_and_is_signed(
    selector: ModelSelector, knowledge: Knowledge, endpoint: GoalsEndpoint
) -> None:
    selector.set_goals(make_goals(min_quality=0.5))
    response = await endpoint.put(request({"ttft_p95_s": 0.5}, x_calm_actor="ann"))
    assert response.status_code == 200
    document = data(response)
    assert (document["goals"]["ttft_p95_s"], document["goals"]["min_quality"]) == (0.5, None)
    assert document["changed"] == {"at": 5.0, "by": "ann", "revision": 1}
    assert selector.goals == Goals(ttft_p95_s=0.5)
    await endpoint.put(request({}))
    assert knowledge.goals_change is not None
    assert knowledge.goals_change.by == "10.0.0.7"


async def test_a_change_that_this_router_has_not_received_yet_is_accepted_not_done(
    selector: ModelSelector, knowledge: Knowledge, endpoint: GoalsEndpoint
) -> None:
    before, knowledge.reachable = selector.goals, False
    response = await endpoint.put(request({"ttft_p95_s": 0.5}, x_calm_actor="ann"))
    assert response.status_code == 202
    document = data(response)
    assert document["goals"]["ttft_p95_s"] == 0.5
    assert document["changed"] == {"at": 5.0, "by": "ann", "revision": 1}
    assert selector.goals == before


async def test_the_document_of_a_get_may_be_put_back(endpoint: GoalsEndpoint) -> None:
    before = data(await endpoint.get(request()))["goals"]
    assert data(await endpoint.put(request(before)))["goals"] == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"ttft_p95": 1.0}, "unknown key 'ttft_p95'; the nearest valid key is 'ttft_p95_s'"),
        ({"ttft_p95_s": -1.0}, "goals.ttft_p95_s: .*greater than 0"),
        ({"ttft_p95_s": "fast"}, "goals.ttft_p95_s"),
        ({"policy": {"name": "lucky"}}, "goals.policy.name"),
        ({"policy": {"name": "single", "slm": "smal"}}, "unknown SLM 'smal'.*'small'"),
        ([1], "JSON object"),
        (b"{", "not valid JSON"),
    ],
)
async def test_wrong_goals_are_refused_and_change_nothing(
    selector: ModelSelector, knowledge: Knowledge, endpoint: GoalsEndpoint, body: Any, message: str
) -> None:
    before = selector.goals
    with pytest.raises(RequestError, match=message) as caught:
        await endpoint.put(request(body))
    assert caught.value.http_status == 400
    assert selector.goals is before
    assert knowledge.history == []


async def test_a_refused_field_is_named_as_the_param(endpoint: GoalsEndpoint) -> None:
    with pytest.raises(RequestError) as caught:
        await endpoint.put(request({"min_quality": 3}))
    assert caught.value.to_openai()["error"]["param"] == "min_quality"


async def test_history_shows_the_newest_changes(endpoint: GoalsEndpoint) -> None:
    for name in ("ann", "bob"):
        await endpoint.put(request({}, x_calm_actor=name))
    document = data(await endpoint.get(request(query="history=1")))
    assert [h["by"] for h in document["history"]] == ["bob"]
    assert "history" not in data(await endpoint.get(request()))


@pytest.mark.parametrize("asked", ["0", "-1", "many", "1001", "1" * 5000])
async def test_a_wrong_history_length_is_refused(endpoint: GoalsEndpoint, asked: str) -> None:
    with pytest.raises(RequestError, match="'history'"):
        await endpoint.get(request(query=f"history={asked}"))


def test_gauges_show_targets_measurements_and_weights(selector: ModelSelector) -> None:
    selector.set_goals(make_goals(ttft_p95_s=1.0, power_w=3.0))
    selector.learn(make_decision("small", "large"), make_outcome(ttft_s=2.0))
    found = {
        (name, *labels): value
        for name, labels, value in fleet_samples({"goals": goals_section(selector)})
    }
    assert found["calm_goal_target", "ttft_p95_s"] == 1.0
    assert found["calm_goal_measured", "ttft_p95_s"] == 2.0
    assert found["calm_goal_held", "ttft_p95_s"] == 0.0
    assert found["calm_goal_target", "power_w"] == 3.0
    assert ("calm_goal_measured", "power_w") not in found
    assert found["calm_weight", "quality"] == 1.0
    assert ("calm_weight", "late_ttft_after_s") not in found
    assert all(name in BY_NAME for name, *_ in found)


def test_the_history_that_may_be_asked_for_is_what_the_knowledge_actor_gives() -> None:
    assert goal_history.MAX_HISTORY == MAX_HISTORY
