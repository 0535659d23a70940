"""Streams run side by side, sessions stay on one replica, a lost client frees the engine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest

from tests.integration.served_fleet import TWO_REPLICAS, ServedFleet, eventually

# Each goes to either replica with the same chance, so all go to one in 1 of 2048 runs.
SESSIONS = 12
LONG = {"max_tokens": 800, "min_tokens": 800, "ignore_eos": True, "temperature": 0}


def stream(fleet: ServedFleet, text: str, model: str) -> list[float]:
    """Read a long stream to its end; return the time of every event."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
    url = f"{fleet.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body | LONG, timeout=60.0) as answer:
        assert answer.status_code == 200
        return [time.monotonic() for line in answer.iter_lines() if line.startswith("data: ")]


def test_two_clients_that_stream_from_one_slm_are_served_side_by_side(fleet: ServedFleet) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda text: stream(fleet, text, "shell"), ("list", "find"))
    # Each went on getting events while the other one was getting events too.
    start, end = max(first[0], second[0]), min(first[-1], second[-1])
    for times in (first, second):
        assert sum(start <= at <= end for at in times) > 100


def test_events_of_a_stream_arrive_while_it_is_generated(fleet: ServedFleet) -> None:
    times = stream(fleet, "count the files", "shell")
    assert times[-1] - times[0] > 0.2
    assert max(b - a for a, b in pairwise(times)) < (times[-1] - times[0]) / 2


def test_the_turns_of_a_session_stay_on_one_replica_whichever_router_they_reach(
    fleet: ServedFleet,
) -> None:
    routers = fleet.router_urls()
    assert len(routers) == 2
    decisions: dict[str, list[str]] = {}
    for session in (f"session-{i}" for i in range(SESSIONS)):
        turns: list[dict[str, str]] = []
        for turn in range(4):
            turns.append({"role": "user", "content": f"{session}: and then, part {turn}?"})
            answer = httpx.post(
                f"{routers[turn % 2]}/v1/chat/completions",
                json={"model": TWO_REPLICAS, "messages": turns, "max_tokens": 2},
                headers={"x-session-id": session},
                timeout=60.0,
            ).raise_for_status()
            decisions.setdefault(session, []).append(answer.headers["x-calm-decision-id"])
            text = answer.json()["choices"][0]["message"]["content"]
            turns.append({"role": "assistant", "content": text})
    served = [{fleet.outcome(i).engine.replica_id for i in ids} for ids in decisions.values()]
    assert [len(replicas) for replicas in served] == [1] * SESSIONS
    assert len(set.union(*served)) == 2  # and not all of them on the same one


def test_an_answer_whose_client_has_left_is_not_generated_to_its_end(
    fleet: ServedFleet,
) -> None:
    body = {"model": "reason", "messages": [{"role": "user", "content": "2 + 2"}], "stream": True}
    endless = {"max_tokens": 1800, "min_tokens": 1800, "ignore_eos": True}
    url = f"{fleet.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body | endless, timeout=60.0) as answer:
        decision_id = answer.headers["x-calm-decision-id"]
        lines = answer.iter_lines()
        for _ in range(20):
            next(lines)
    left_s = time.monotonic()
    eventually("the engine is idle", lambda: fleet.slm("reason")["running"] == 0, 15.0)
    outcome = fleet.outcome(decision_id)
    assert outcome.status == "cancelled"
    assert outcome.timing.e2e_s is not None and outcome.timing.e2e_s < 10.0
    assert time.monotonic() - left_s < 15.0
    assert fleet.chat("1 + 1", "reason", max_tokens=4).status_code == 200


def test_a_plain_request_that_its_client_gives_up_is_cancelled_too(fleet: ServedFleet) -> None:
    body = {"model": "reason", "messages": [{"role": "user", "content": "3 + 3"}]}
    endless = {"max_tokens": 1800, "min_tokens": 1800, "ignore_eos": True}
    label = {"x-calm-task": "given-up"}
    with pytest.raises(httpx.ReadTimeout):
        fleet.post("/v1/chat/completions", body | endless, label, timeout=0.5)
    with fleet.store() as store:
        (row,) = eventually(
            "its outcome is stored",
            lambda: [o for o in store.recent(100) if o.task == "given-up"],
            15.0,
        )
    assert (row.slm_id, row.status) == ("reason", "cancelled")
    eventually("the engine is idle", lambda: fleet.slm("reason")["running"] == 0, 15.0)
