"""The cold tier's autoscaling policy: counts by tier, and nothing that could harm Serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID

from deployments.slm.autoscaling import ColdTierPolicy, LoadPolicy


def context(requests: float = 0.0, replicas: int = 1, queued: float | None = 0.0) -> Any:
    """One SLM whose requests are spread over two replicas."""
    config = SimpleNamespace(get_target_ongoing_requests=lambda: 4.0)
    return SimpleNamespace(
        aggregated_metrics={"ongoing": {"r1": requests / 2, "r2": requests / 2}},
        total_queued_requests=queued,
        current_num_replicas=replicas,
        config=config,
    )


@pytest.mark.parametrize(("requests", "queued", "replicas"), [(0, 0, 0), (8, 0, 2), (8, 1, 3)])
def test_load_is_what_the_replicas_report_and_what_waits_for_a_first_replica(
    requests: float, queued: float, replicas: int
) -> None:
    assert LoadPolicy()(context(requests, queued=queued)) == (replicas, {})


def test_replicas_that_have_reported_nothing_yet_count_as_idle() -> None:
    silent = context(queued=None)
    silent.aggregated_metrics = None
    assert LoadPolicy()(silent) == (0, {})


def counts(desired: dict[str, str], **requests: float) -> dict[str, int]:
    policy = ColdTierPolicy(follow=False)
    policy.set_desired(desired)
    contexts = {DeploymentID(f"slm-{i}", "calm"): context(n) for i, n in requests.items()}
    found, states = policy(contexts)
    assert states == {}
    return {i.name.removeprefix("slm-"): n for i, n in found.items()}


def test_a_cold_slm_has_no_replica_whatever_its_load() -> None:
    assert counts({"a": "cold"}, a=9.0) == {"a": 0}


@pytest.mark.parametrize("tier", ["cold", "asleep"])
def test_an_slm_that_is_not_to_be_hot_is_not_started(tier: str) -> None:
    policy = ColdTierPolicy(follow=False)
    policy.set_desired({"a": tier})
    assert policy({DeploymentID("slm-a", "calm"): context(1.0, replicas=0)}) == ({}, {})


def test_a_sleeping_slm_keeps_the_replicas_that_it_has() -> None:
    assert counts({"a": "asleep"}, a=9.0) == {}


@pytest.mark.parametrize(("requests", "replicas"), [(0.0, 1), (4.0, 1), (4.1, 2), (12.0, 3)])
def test_a_hot_slm_has_one_replica_or_what_its_load_asks_for(
    requests: float, replicas: int
) -> None:
    assert counts({"a": "hot"}, a=requests) == {"a": replicas}
    assert counts({"other": "cold"}, a=requests) == {"a": replicas}


def test_without_desired_residency_load_alone_decides() -> None:
    assert counts({}, a=0.0, b=5.0) == {"a": 0, "b": 2}


def test_a_failure_changes_no_replica_count() -> None:
    policy = ColdTierPolicy(follow=False)
    policy.set_desired({"a": "hot"})
    assert policy({DeploymentID("slm-a", "calm"): None}) == ({}, {})
