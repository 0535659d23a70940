"""A bare Ray Serve, once per module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.served_fleet import free_port

ENVIRONMENT = {
    # Ray would otherwise write a token file into the home directory.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers import this project and the test modules by name.
    "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}


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
