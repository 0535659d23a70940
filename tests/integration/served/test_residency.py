"""Half of the fleet's memory serves the whole fleet: SLMs sleep and wake."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.served_fleet import ServedFleet, eventually

IDS = ("extract", "sql", "shell", "reason", "intent", "general")


def rows(fleet: ServedFleet) -> dict[str, dict[str, Any]]:
    return {r["id"]: r for r in fleet.get("/v1/fleet")["slms"]}


@pytest.fixture
def budget(fleet: ServedFleet) -> int:
    """About half of what all replicas together declare."""
    whole = sum(r["declared_bytes"] * r["replicas"] for r in rows(fleet).values())
    half = whole // 2
    fleet.put("/v1/residency", {"memory_budget_bytes": half}).raise_for_status()
    eventually("the budget holds", lambda: holds(fleet, half), 30.0)
    return half


def holds(fleet: ServedFleet, budget: int) -> bool:
    """Whether every router knows the budget, and it was reached."""
    documents = [d.get("residency") or {} for d in fleet.each_router("/v1/fleet")]
    return all(d.get("peak_bytes", 0) > 0 and d["hot_bytes"] <= budget for d in documents)


def test_every_slm_answers_within_half_of_the_memory(fleet: ServedFleet, budget: int) -> None:
    asleep = [i for i, r in rows(fleet).items() if r["state"] == "asleep"]
    assert asleep
    for slm_id in (*IDS, *reversed(IDS)):
        answer = fleet.chat("list all files", slm_id, max_tokens=4)
        assert (answer.status_code, answer.headers["x-calm-model"]) == (200, slm_id)
        assert fleet.get("/v1/fleet")["residency"]["hot_bytes"] <= budget
    # All at once: requests of an SLM wait together, and none is refused.
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(fleet.chat, "list files", IDS[n % 6], max_tokens=4) for n in range(36)]
        assert [f.result().status_code for f in asked] == [200] * 36

    def counted() -> dict[str, Any] | None:
        found: dict[str, Any] = fleet.get("/v1/fleet")["residency"]
        return found if found["hits"] + found["misses"] >= 48 else None

    residency = eventually("every request was counted", counted, 10.0)
    assert residency["peak_bytes"] <= budget
    assert residency["swaps"] >= 6
    assert 0.0 < residency["hit_ratio"] < 1.0
    assert all(r["wake_s"] > 0.0 for i, r in rows(fleet).items() if i in asleep and i in IDS)


def test_a_stream_of_a_sleeping_slm_is_complete(fleet: ServedFleet, budget: int) -> None:
    sleeper = next(i for i, r in rows(fleet).items() if r["state"] == "asleep")
    body = {
        "model": sleeper,
        "stream": True,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "list all files"}],
    }
    answer = fleet.post("/v1/chat/completions", body)
    assert answer.status_code == 200
    assert answer.text.rstrip().endswith("data: [DONE]")
    outcome = fleet.outcome(answer.headers["x-calm-decision-id"])
    assert outcome.timing.cold
    assert outcome.decision.preferred_hot is False


def test_a_deadline_before_the_wake_up_is_refused_with_retry_after(
    fleet: ServedFleet, budget: int
) -> None:
    sleeper = next(i for i, r in rows(fleet).items() if r["state"] == "asleep")
    answer = fleet.chat("list all files", sleeper, {"x-calm-deadline-s": "0.001"}, max_tokens=4)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "model_asleep"
