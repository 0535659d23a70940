"""What a test changed in the shared fleet is undone, over the public API, before the next one."""

from __future__ import annotations

import time
from typing import Any

import httpx

from tests.integration.served_fleet import POLL_S, ServedFleet

REST_S = 150.0  # a killed replica is back
NEUTRAL = 0.05  # calibration factors this close to 1 move no decision that a test looks at


class Rest:
    """The fleet as it was when it had just started, and the way back to it."""

    def __init__(self, fleet: ServedFleet) -> None:
        self._fleet = fleet
        document = fleet.get("/v1/goals")
        self._goals, self._goals_version = document["goals"], document["version"]
        self._predictor = fleet.get("/v1/fleet")["predictor"]["version"]

    def restore(self) -> None:
        """Undo changes of goals, residency, predictors and applications; wait for rest."""
        deadline_s = time.monotonic() + REST_S
        while found := self._unrest():
            assert time.monotonic() < deadline_s, f"no rest within {REST_S:g} s: {found}"
            self._undo(found)
            time.sleep(POLL_S)

    def _unrest(self) -> set[str]:
        """What is not as it was; empty when the fleet is at rest."""
        fleet = self._fleet
        try:
            routers = fleet.router_urls()
            found = {reason for url in routers for reason in self._unrest_at(url)}
            if set(fleet.applications()) != {fleet.application["name"]}:
                found.add("applications")
        except httpx.HTTPError as error:  # a router that has just been killed
            return {repr(error)}
        if len(routers) != fleet.application["args"]["router"]["replicas"]:
            found.add("routers")
        return found

    def _unrest_at(self, url: str) -> set[str]:
        document = httpx.get(f"{url}/v1/fleet", timeout=30.0).raise_for_status().json()
        predictor, found = document["predictor"], set()
        if document["goals"]["version"] != self._goals_version:
            found.add("goals")
        if "residency" in document:
            found.add("residency")
        if predictor.get("pinned"):
            found.add("pinned predictor")
        if predictor["version"] != self._predictor:
            found.add(f"predictor {predictor['version']}")
        if not predictor["knowledge_reachable"]:
            found.add("knowledge actor")
        if predictor["outcomes_pending"]:
            found.add("pending outcomes")
        if {r["id"] for r in document["slms"]} != set(self._fleet.replica_counts):
            found.add("SLMs")
        for row in document["slms"]:
            found |= {f"{row['id']} {reason}" for reason in self._unrest_of(row)}
            if row["state"] == "degraded" or row["calibration_factor"] < 1.0 - NEUTRAL:
                self._ask_easy_question(url, row["id"])
        return found

    def _unrest_of(self, row: dict[str, Any]) -> set[str]:
        found = set()
        if row["state"] != "hot":
            found.add(row["state"])
        if row["replicas"] != self._fleet.replica_counts.get(row["id"]):
            found.add(f"has {row['replicas']} replicas")
        if row["running"] + row["waiting"]:
            found.add("busy")
        if abs(row["calibration_factor"] - 1.0) > NEUTRAL:
            found.add(f"calibration factor {row['calibration_factor']:.2f}")
        return found

    def _ask_easy_question(self, url: str, slm_id: str) -> None:
        """Send one of the SLM's examples.

        Its answer closes the router's circuit breaker. It passes the SLM's validator, which makes
        up for answers that did not: a calibration factor fades with a half-life of three minutes.
        """
        question = {"role": "user", "content": self._fleet.examples[slm_id]}
        body = {"model": slm_id, "messages": [question], "temperature": 0}
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60.0)

    def _undo(self, found: set[str]) -> None:
        if "applications" in found:
            self._fleet.deploy()
        if "pinned predictor" in found:
            self._fleet.post("/v1/predictors", {"action": "unpin"})
        if "goals" in found:
            self._fleet.put("/v1/goals", self._goals)
        if "residency" in found:
            self._fleet.put("/v1/residency", {})
