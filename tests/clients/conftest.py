"""One served fleet for the tier. This folder runs in an environment that holds clients only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 150.0

# Before LiteLLM is imported: it would ask the internet for a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The endpoint of a fleet of packaged models; see `tests/integration/packaged_fleet.py`."""
    service = subprocess.Popen(
        [ROOT / ".venv" / "bin" / "python", "-m", "tests.clients.service"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C is for pytest alone, which then ends the service in its own time.
        start_new_session=True,
    )
    assert service.stdin is not None and service.stdout is not None
    try:
        endpoint = service.stdout.readline().strip()
        assert endpoint, "the fleet did not start; its log is above"
        yield endpoint
    finally:
        service.stdin.close()
        status = service.wait(STOP_S)
    assert status == 0
