"""An SLM in an application of its own joins the running fleet and leaves it; nothing restarts."""

from __future__ import annotations

import copy
from typing import Any

import httpx
from served_fleet import READY_S, ROOT, ServedFleet, eventually

NEWCOMER: dict[str, Any] = {
    "id": "newcomer",
    "model": str(ROOT / "deployments" / "reference_fleet" / "models" / "shell"),
    "skills": ["shell"],
    "batching": "interactive",
    "resources": {"num_cpus": 0.1, "memory_bytes": "1.4GiB", "kv_cache_bytes": "64MiB"},
}


def deploy(fleet: ServedFleet, *more: dict[str, Any]) -> None:
    """What `serve deploy` does: put the whole configuration."""
    config = copy.deepcopy(fleet.config)
    config["applications"] += more
    url = f"{fleet.dashboard_url}/api/serve/applications/"
    httpx.put(url, json=config, timeout=60.0).raise_for_status()


def pids(fleet: ServedFleet) -> dict[str, set[int]]:
    return {name: {r["pid"] for r in replicas} for name, replicas in fleet.replicas().items()}


def test_an_slm_joins_as_an_application_of_its_own_and_leaves_again(fleet: ServedFleet) -> None:
    before = pids(fleet)
    application = {
        "name": "slm-newcomer",
        "import_path": "deployments.app:build_slm",
        "route_prefix": None,
        "args": NEWCOMER,
    }
    deploy(fleet, application)
    routers = fleet.router_urls()
    eventually("every router serves it", lambda: all(serves(url) for url in routers), READY_S / 2)
    assert "newcomer" in listed(fleet)
    answer = fleet.chat("list files", "newcomer", max_tokens=4)
    assert answer.headers["x-calm-model"] == "newcomer"
    assert fleet.outcome(answer.headers["x-calm-decision-id"]).status == "ok"
    candidates = {c["slm_id"] for c in fleet.route("How many apples?")["candidates"]}
    assert "newcomer" in candidates
    after = pids(fleet)
    assert after.pop("slm-newcomer") and after.pop("announcer")
    assert after == before

    deploy(fleet)
    eventually(
        "it is gone at every router",
        lambda: not any(serves(url) for url in routers) and "newcomer" not in listed(fleet),
        READY_S / 2,
    )
    assert fleet.chat("list files", "newcomer", max_tokens=4).status_code == 404
    assert pids(fleet) == before


def listed(fleet: ServedFleet) -> set[str]:
    return {m["id"] for m in fleet.get("/v1/models")["data"]}


def serves(url: str) -> bool:
    slms = httpx.get(f"{url}/v1/fleet", timeout=60.0).json()["slms"]
    return any(s["id"] == "newcomer" and s["state"] == "hot" for s in slms)
