"""An operator's actions on a running fleet: set goals, add an SLM, exchange a checkpoint."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import httpx

from calm_serve.cli import main
from load_tests.common.served import Service

TIMEOUT_S = 60.0
CHANGE_S = 180.0  # a replica's start takes 10 to 30 s
POLL_S = 0.25


class Operator:
    """Blocking calls of the public interfaces: HTTP, Serve's configuration, the command line."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._http = httpx.Client(base_url=service.url, timeout=TIMEOUT_S)
        self.stated: dict[str, Any] = self.get("/v1/goals")["goals"]

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """A JSON document of the endpoint."""
        return dict(self._http.get(path).raise_for_status().json())

    def set_goals(self, **change: Any) -> None:
        """Set the stated goals with these changes; without any, restore them."""
        put = self._http.put("/v1/goals", json={**self.stated, **change})
        put.raise_for_status()

    def targets(self) -> list[dict[str, Any]]:
        """The service's report on every target."""
        return list(self.get("/v1/goals")["targets"])

    def predictor(self) -> dict[str, Any]:
        """The `predictor` of /v1/fleet."""
        return dict(self.get("/v1/fleet")["predictor"])

    def alarms(self, slm_id: str) -> list[dict[str, Any]]:
        """Active alarms of an SLM."""
        return [a for a in self.get("/v1/fleet")["alarms"] if a["slm"] == slm_id]

    def slm(self, slm_id: str) -> dict[str, Any]:
        """The SLM's row of /v1/fleet, {} if there is none."""
        rows = self.get("/v1/fleet")["slms"]
        return next((dict(r) for r in rows if r["id"] == slm_id), {})

    def calm(self, *arguments: str) -> str:
        """The output of `calm ARGUMENTS --url …`. Raises RuntimeError unless its status is 0."""
        printed = StringIO()
        with redirect_stdout(printed):
            status = main.main([*arguments, "--url", self._service.url])
        if status:
            raise RuntimeError(f"calm {' '.join(arguments)}: exit status {status}")
        return printed.getvalue()

    def join(self, spec: Mapping[str, Any]) -> float:
        """Deploy one SLM as an application of its own. Returns the seconds until it is hot."""
        started = time.monotonic()
        config = copy.deepcopy(self._service.config)
        config["applications"].append(
            {
                "name": f"slm-{spec['id']}",
                "import_path": "deployments.app:build_slm",
                "route_prefix": None,
                "args": dict(spec),
            }
        )
        self._applications(config).raise_for_status()
        wait_until(f"{spec['id']} serves", lambda: self.slm(spec["id"]).get("state") == "hot")
        return time.monotonic() - started

    def exchange(self, slm_id: str, folder: Path, checkpoint: Path) -> float:
        """Replace the SLM's checkpoint by another one and kill its replica, which restarts.

        Stands for a bad copy followed by a crash. Returns the seconds until the SLM is hot again.
        """
        shutil.rmtree(folder)
        shutil.copytree(checkpoint, folder)
        started = time.monotonic()
        name = f"slm-{slm_id}"
        old = self._replicas(name)
        for replica in old.values():
            os.kill(replica["pid"], signal.SIGKILL)

        def replaced() -> bool:
            return bool(self._replicas(name).keys() - old.keys())

        wait_until(f"{slm_id} has another replica", replaced)
        wait_until(f"{slm_id} serves", lambda: self.slm(slm_id)["state"] == "hot")
        return time.monotonic() - started

    def _replicas(self, deployment: str) -> dict[str, dict[str, Any]]:
        found = self._applications().raise_for_status().json()["applications"]
        return {
            r["replica_id"]: r
            for application in found.values()
            for r in application["deployments"].get(deployment, {}).get("replicas", ())
            if r["state"] == "RUNNING"
        }

    def _applications(self, config: Mapping[str, Any] | None = None) -> httpx.Response:
        url = f"{self._service.dashboard_url}/api/serve/applications/"
        if config is None:
            return httpx.get(url, timeout=TIMEOUT_S)
        return httpx.put(url, json=dict(config), timeout=TIMEOUT_S)


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float = CHANGE_S) -> None:
    """Poll until `condition()` is true. Raises RuntimeError after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_S)
