"""Feedback on served requests changes later decisions, at every router, without a restart.

The users of these tests have an opinion of their own: whatever looks like one of their reports is
answered well by the SLM that the shipped predictor thinks worst of, and badly by everybody else.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from served_fleet import MIN_OUTCOMES, RETRAIN_EVERY, ServedFleet, eventually

SLMS = ("extract", "sql", "shell", "reason", "intent", "general")
ROUNDS = 30


def report(number: int) -> str:
    return f"Quarterly glockenspiel ledger of branch {number}, please"


def rankings(urls: list[str]) -> list[list[str]]:
    """Each router's SLMs, best first, for a report that nobody has sent yet."""
    found = []
    for url in urls:
        body = {"messages": [{"role": "user", "content": report(99_999)}]}
        answer = httpx.post(f"{url}/v1/route", json=body, timeout=60.0).raise_for_status().json()
        # What was chosen to explore is not what is believed to be best.
        scored = [c for c in answer["candidates"] if c["prediction"]]
        found.append([c["slm_id"] for c in sorted(scored, key=lambda c: -c["score"])])
    return found


def versions(urls: list[str]) -> list[str]:
    fleets = [httpx.get(f"{url}/v1/fleet", timeout=60.0).json() for url in urls]
    return [f["predictor"]["version"] for f in fleets]


def serve_and_judge(fleet: ServedFleet, wanted: str, job: tuple[int, str]) -> None:
    number, slm = job
    answer = fleet.chat(report(number), slm, max_tokens=1)
    said: dict[str, Any] = {
        "decision_id": answer.headers["x-calm-decision-id"],
        "score": float(slm == wanted),
    }
    assert fleet.post("/v1/feedback", said).status_code == 200


def test_feedback_moves_later_requests_to_the_slm_that_users_prefer(fleet: ServedFleet) -> None:
    routers = fleet.router_urls()
    assert len(routers) == 2
    before = versions(routers)
    first, second = rankings(routers)
    wanted = max(SLMS, key=lambda slm: first.index(slm) + second.index(slm))
    assert wanted not in (first[0], second[0])

    jobs = [(6 * i + j, slm) for i in range(ROUNDS) for j, slm in enumerate(SLMS)]
    assert len(jobs) >= MIN_OUTCOMES + RETRAIN_EVERY
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: serve_and_judge(fleet, wanted, job), jobs))

    eventually(
        "both routers prefer the SLM that users prefer",
        lambda: [r[0] for r in rankings(routers)] == [wanted, wanted],
        120.0,
    )
    after = versions(routers)
    assert len(set(after)) == 1
    assert after[0].startswith("lgbm-") and after[0] not in before
    assert fleet.get("/v1/fleet")["predictor"]["source"] == "trained"

    served = fleet.chat(report(100_000), max_tokens=1)
    row = fleet.outcome(served.headers["x-calm-decision-id"])
    assert row.versions[0] == after[0]
    assert row.path in ("scored", "explored")
