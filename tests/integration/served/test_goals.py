"""Goals change while the fleet serves: audited, at every router, and the weights follow."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.integration.served_fleet import ServedFleet, eventually, prompts

APPLIED_S = 2.0
REQUESTS = 40  # to each router; the controller needs 16 scored ones
STRICT_J = 1e-4  # less than any answer takes


@pytest.fixture
def configured(fleet: ServedFleet) -> dict[str, Any]:
    """The goals of the configuration."""
    return dict(fleet.get("/v1/goals")["goals"])


def put(url: str, goals: dict[str, Any]) -> httpx.Response:
    headers = {"x-calm-actor": "integration"}
    return httpx.put(f"{url}/v1/goals", json=goals, headers=headers, timeout=30.0)


def document(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/v1/goals", timeout=30.0).raise_for_status().json())


def ask(url: str, text: str) -> str:
    body = {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60.0)
    return answer.raise_for_status().headers["x-calm-decision-id"]


def test_a_wrong_goal_is_refused_in_openais_format(fleet: ServedFleet) -> None:
    answer = put(fleet.url, {"ttft_p95": 1.0})
    assert answer.status_code == 400
    assert "'ttft_p95_s'" in answer.json()["error"]["message"]


def test_goals_reach_every_router_within_two_seconds_and_move_its_weights(
    fleet: ServedFleet, configured: dict[str, Any]
) -> None:
    routers = fleet.router_urls()
    assert len(routers) == 2
    goals = {**configured, "energy_per_request_j": STRICT_J, "exploration_ratio": 0.0}
    sent_s = time.monotonic()
    put(fleet.url, goals).raise_for_status()
    while any(document(u)["goals"]["energy_per_request_j"] != STRICT_J for u in routers):
        assert time.monotonic() - sent_s < APPLIED_S

    stated = configured["energy_weight_per_j"]
    asked = prompts("reason", instructed=False, count=REQUESTS)
    for url in routers:
        last = [ask(url, text) for text in asked][-1]
        eventually(
            "the weights have moved",
            lambda url=url: document(url)["weights"]["energy_per_j"] > stated,  # type: ignore[misc]
            10.0,
        )
        (target,) = document(url)["targets"]
        assert (target["name"], target["held"]) == ("energy_per_request_j", False)
        assert target["feasible"] is False
        route = {"model": "auto", "messages": [{"role": "user", "content": asked[0]}]}
        decision = httpx.post(f"{url}/v1/route", json=route, timeout=60.0).json()
        if decision["weights"]:
            assert decision["weights"]["energy_per_j"] > stated
        assert httpx.get(f"{url}/v1/decisions/{last}", timeout=30.0).status_code == 200


def test_changes_are_in_the_audit_trail_the_fleet_document_and_the_metrics(
    fleet: ServedFleet, configured: dict[str, Any]
) -> None:
    put(fleet.url, {**configured, "ttft_p95_s": 30.0}).raise_for_status()
    newest, before = fleet.get("/v1/goals?history=2")["history"]
    assert newest["by"] == "integration"
    assert newest["new"]["ttft_p95_s"] == 30.0
    assert newest["old"] == before["new"]
    with fleet.store() as store:
        assert store.goal_changes(1)[0].revision == newest["revision"]
    url = fleet.router_urls()[0]
    section = httpx.get(f"{url}/v1/fleet", timeout=30.0).json()["goals"]
    assert [t["name"] for t in section["targets"]] == ["ttft_p95_s"]
    text = httpx.get(f"{url}/metrics", timeout=30.0).text
    assert 'calm_goal_target{goal="ttft_p95_s"} 30.0' in text
    assert 'calm_weight{kind="latency_per_s"}' in text
