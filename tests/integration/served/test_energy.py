"""Joules of a served SLM add up."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.integration.served_fleet import ServedFleet, eventually

SLM = "intent"
REQUESTS = 30


def measured_energy(fleet: ServedFleet, not_before: float) -> dict[str, Any]:
    """The SLM's energy, from a report made after `not_before` (monotonic seconds)."""

    def look() -> dict[str, Any] | None:
        energy = dict(fleet.slm(SLM)["energy"])
        made_at = time.monotonic() - energy.get("age_s", float("inf"))
        return energy if made_at > not_before else None

    return eventually("the replica reports its energy", look, 30.0)


def test_what_requests_are_charged_plus_idle_is_the_cpu_time_of_the_replica(
    fleet: ServedFleet,
) -> None:
    before = measured_energy(fleet, time.monotonic())
    charged_j = 0.0
    answers = [fleet.chat(f"word {i}", SLM, max_tokens=16) for i in range(REQUESTS)]
    fleet.settle()
    after = measured_energy(fleet, time.monotonic() + 1.0)
    for answer in answers:
        outcome = fleet.outcome(answer.headers["x-calm-decision-id"])
        assert outcome.engine.energy_j is not None
        charged_j += outcome.engine.energy_j
    assert after["requests_j"] - before["requests_j"] == pytest.approx(charged_j, rel=1e-3)
    assert after["idle_j"] >= before["idle_j"]
    assert after["requests_j"] + after["idle_j"] == pytest.approx(after["total_j"], rel=0.05)
    assert after["attribution_error_ratio"] < 0.05
    assert after["estimated"] == (after["source"] == "estimate")
