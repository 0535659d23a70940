"""An SLM in an application of its own joins the running fleet and leaves it; nothing restarts."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.integration.served_fleet import READY_S, ROOT, ServedFleet, eventually

JOINED: dict[str, Any] = {
    "id": "joined",
    "model": str(ROOT / "deployments" / "reference_fleet" / "models" / "shell"),
    "skills": ["shell"],
    "batching": "interactive",
    "resources": {"num_cpus": 0.1, "memory_bytes": "1.4GiB", "kv_cache_bytes": "64MiB"},
}


def pids(fleet: ServedFleet) -> dict[str, set[int]]:
    return {name: {r["pid"] for r in replicas} for name, replicas in fleet.replicas().items()}


@pytest.mark.timeout(300)  # an engine starts: 15 to 40 s on two cores
def test_an_slm_joins_as_an_application_of_its_own_and_leaves_again(fleet: ServedFleet) -> None:
    before = pids(fleet)
    application = {
        "name": "slm-joined",
        "import_path": "deployments.app:build_slm",
        "route_prefix": None,
        "args": JOINED,
    }
    fleet.deploy(application)
    routers = fleet.router_urls()
    eventually("every router serves it", lambda: all(serves(url) for url in routers), READY_S / 2)
    assert "joined" in listed(fleet)
    answer = fleet.chat("list files", "joined", max_tokens=4)
    assert answer.headers["x-calm-model"] == "joined"
    assert fleet.outcome(answer.headers["x-calm-decision-id"]).status == "ok"
    candidates = {c["slm_id"] for c in fleet.route("How many apples?")["candidates"]}
    assert "joined" in candidates
    after = pids(fleet)
    assert after.pop("slm-joined") and after.pop("registration")
    assert after == before

    fleet.deploy()
    eventually(
        "it is gone at every router",
        lambda: not any(serves(url) for url in routers) and "joined" not in listed(fleet),
        READY_S / 2,
    )
    assert fleet.chat("list files", "joined", max_tokens=4).status_code == 404
    assert pids(fleet) == before


def listed(fleet: ServedFleet) -> set[str]:
    return {m["id"] for m in fleet.get("/v1/models")["data"]}


def serves(url: str) -> bool:
    slms = httpx.get(f"{url}/v1/fleet", timeout=60.0).json()["slms"]
    return any(s["id"] == "joined" and s["state"] == "hot" for s in slms)
