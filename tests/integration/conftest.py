"""Real clusters: the whole served fleet, once per run, and a bare Ray Serve, once per module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from served_fleet import ServedFleet, free_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

ENVIRONMENT = {
    # Ray would otherwise write a token file into the home directory.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers import this project and the test modules by name.
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}


# These change what the other modules look at: who decides, which SLMs there are, which processes.
LAST = ("test_served_growth", "test_served_learning", "test_served_resilience")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the modules of LAST in that order after all others."""
    items.sort(key=lambda item: LAST.index(item.path.stem) if item.path.stem in LAST else -1)


@pytest.fixture(scope="session")
def fleet() -> Iterator[ServedFleet]:
    """The reference fleet with two router replicas and two of `general`."""
    served = ServedFleet()
    served.start()
    yield served
    assert served.stop() == 0


@pytest.fixture(scope="session")
def client(fleet: ServedFleet) -> OpenAI:
    """The official client, connected to the fleet."""
    return fleet.openai()


@pytest.fixture(scope="module")
def serve_cluster() -> Iterator[str]:
    """Start Ray (four logical CPUs, no dashboard) and Serve; yield Serve's base URL."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENVIRONMENT.items():
            environment.setenv(name, value)
        import ray
        from ray import serve

        port = free_port()
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
            serve.shutdown()
        finally:
            ray.shutdown()
