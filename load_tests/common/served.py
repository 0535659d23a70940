"""Serve a fleet while a benchmark runs, on loopback, with ports and folders of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]
FLEETS = ROOT / "deployments" / "fleets"
READY_S = 600.0
STOP_S = 90.0

Change = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Service:
    """A running service: its endpoint, its Serve configuration and its log."""

    url: str
    config: dict[str, Any]
    log: Path

    @property
    def dashboard_url(self) -> str:
        """URL of Ray's dashboard, from the log. Raises RuntimeError if it is not there."""
        text = self.log.read_text("utf-8")
        found = re.search(r"dashboard at \S*?(http://[\d.]+:\d+)", text)
        if found is None:
            raise RuntimeError(f"no dashboard in the log:\n{text[-2000:]}")
        return found[1]


@contextmanager
def served(
    fleet: Mapping[str, Any] | None = None,
    change: Change | None = None,
    state: Path | None = None,
    *,
    plain: bool = False,
    deployments: Sequence[Mapping[str, Any]] = (),
) -> Iterator[str]:
    """As `serving`, but yields the endpoint's URL alone."""
    with serving(fleet, change, state, plain=plain, deployments=deployments) as service:
        yield service.url


@contextmanager
def serving(
    fleet: Mapping[str, Any] | None = None,
    change: Change | None = None,
    state: Path | None = None,
    *,
    plain: bool = False,
    deployments: Sequence[Mapping[str, Any]] = (),
) -> Iterator[Service]:
    """Serve until the block ends.

    `fleet` replaces the reference fleet; its paths are relative to the folder of the fleet files.
    `change` edits the application's `args`; `state` is the folder that keeps outcomes; `plain`
    turns Serve's fast transport off; `deployments` are Serve's overrides of single deployments.
    Raises RuntimeError, with the end of the log, if the fleet does not become ready.
    """
    # Short: Ray puts Unix sockets below it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="calm", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port = free_port()
        path = folder / "serve_config.yaml"
        config = _config(folder, port, fleet, change, state)
        if deployments:
            config["applications"][0]["deployments"] = [dict(d) for d in deployments]
        path.write_text(yaml.safe_dump(config), "utf-8")
        log = folder / "serve.log"
        environment = {**os.environ, "RAY_TMPDIR": name, "RAY_AUTH_MODE": "disabled"}
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "deployments.serve", str(path), *(["--plain"] * plain)],
                cwd=ROOT,
                env=environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield Service(url, config, log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(STOP_S)


def fleet_file(name: str) -> dict[str, Any]:
    """One of the project's fleet files, with absolute paths."""
    text = (FLEETS / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(absolute(yaml.safe_load(text)))


def absolute(value: Any) -> Any:
    """The value with paths that are relative to the fleet files made absolute."""
    if isinstance(value, dict):
        return {k: absolute(v) for k, v in value.items()}
    if isinstance(value, list):
        return [absolute(v) for v in value]
    if isinstance(value, str) and value.startswith("../"):
        return str((FLEETS / value).resolve())
    return value


def free_port() -> int:
    """A TCP port that was free just now; another process may take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _config(
    folder: Path,
    port: int,
    fleet: Mapping[str, Any] | None,
    change: Change | None,
    state: Path | None,
) -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    args = config["applications"][0]["args"]
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(dict(fleet or fleet_file("reference"))), encoding="utf-8")
    args["fleet"] = str(path)
    args["learning"]["state_dir"] = str(state or folder / "state")
    if change is not None:
        change(args)
    return dict(config)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the fleet did not become ready:\n{log.read_text('utf-8')[-3000:]}")
