"""`python -m deployments.serve CONFIG`: check the configuration, then `serve run CONFIG`.

Sets Serve's transport flags before the cluster starts (they cannot be set later), prints the SLMs'
states while they load, and one ready line with a command to try. Ctrl-C stops everything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calm_serve.config import (
    ClusterResources,
    Fleet,
    check_resources,
    find_application_args,
    load_args,
    read_yaml,
)
from calm_serve.errors import ConfigError
from deployments.launch import PortClaim, check_engine_arguments, write_launcher

# Serve's fast transport: HAProxy in front, gRPC between replicas, one event loop per replica.
FAST_TRANSPORT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
MIDDLEWARE = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.launch.client_middleware:middlewares"
}
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
    # By default Ray's workers yield to every other process (15); here they are the main load.
    "RAY_worker_niceness": "0",
}
POLL_S = 0.5
BUILD_FAILED = re.compile(
    rb"Deploying app '.*' failed|calm_serve\.errors\.ConfigError"
    rb"|build_serve_application failed.*User exception"
)


def main(argv: list[str] | None = None) -> int:
    """Run until Serve ends or Ctrl-C. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.serve", description=__doc__)
    parser.add_argument("config", nargs="?", default="serve_config.yaml")
    parser.add_argument("--plain", action="store_true", help="without the fast transport flags")
    options = parser.parse_args(argv)
    path = Path(options.config)
    try:
        url = check(path)
        ports = PortClaim()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if port_taken(url):
        print(f"error: {url} already answers; stop that server first", file=sys.stderr)
        return 2
    transport = "off (slower)" if options.plain else "on"
    print(f"calm_serve: starting Ray Serve, fast transport {transport}", flush=True)
    with closing(ports), TemporaryDirectory() as folder:
        haproxy = {"RAY_SERVE_HAPROXY_BINARY_PATH": str(write_launcher(Path(folder)))}
        own = {**ports.environment, **haproxy}
        return run(path, url, serve_environment(own, fast=not options.plain))


def run(path: Path, url: str, environment: Mapping[str, str]) -> int:
    """Run `serve run` until it ends or a signal ends it. Returns the exit status."""
    # Before the child exists: a program started in the background ignores SIGINT, and only a
    # handled signal is reset to its default in the child, which needs it to shut down.
    child: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        if child is not None:
            child.send_signal(signal.SIGINT)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)
    child = subprocess.Popen(
        [str(Path(sys.executable).with_name("serve")), "run", str(path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # So that Ctrl-C reaches this process alone, which passes it on once. A new session would do
        # that too, but Linux's autogroup scheduling divides CPU time equally among sessions, so the
        # whole fleet would get no more than one shell.
        process_group=0,
    )
    output = Output(child)
    follow(child, url, output)
    return child.wait() or int(output.build_failed)


def check(path: Path) -> str:
    """Validate the configuration and return the service's URL. Raises ConfigError."""
    config = read_yaml(path)
    args, fleet = load_args(find_application_args(config, path.name), Path.cwd())
    check_engine_arguments(fleet)
    check_api_keys(fleet, os.environ)
    if not os.environ.get("RAY_ADDRESS"):
        check_resources(fleet, local_resources(), args.router.total_cpus)
    http = config.get("http_options") or {}
    return f"http://{http.get('host', '127.0.0.1')}:{http.get('port', 8000)}"


def check_api_keys(fleet: Fleet, environment: Mapping[str, str]) -> None:
    """Raise ConfigError when a remote SLM's key is not in the environment."""
    for slm in fleet.slms:
        name = slm.remote.api_key_env if slm.remote else ""
        if name and not environment.get(name):
            raise ConfigError(f"SLM {slm.id!r}: the environment variable {name} is not set")


def local_resources() -> ClusterResources:
    """Return what the cluster that Ray would start on this machine offers."""
    # Ray's own estimate: its memory is what is free now, less the share of the object store.
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    found = ResourceAndLabelSpec().resolve(is_head=True)
    return ClusterResources(float(found.num_cpus), float(found.num_gpus), float(found.memory))


def serve_environment(own: Mapping[str, str], *, fast: bool) -> dict[str, str]:
    """Return the environment of `serve run`; the operator's variables override `own`."""
    return {**QUIET, **MIDDLEWARE, **own, **(FAST_TRANSPORT if fast else {}), **os.environ}


class Output:
    """Copies the child's output to stdout and detects that the application could not be built.

    In that case `serve run` only logs the error and keeps running without an application.
    """

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.build_failed = False
        self._child = child
        self.thread = threading.Thread(target=self._pass_on, daemon=True)
        self.thread.start()

    def _pass_on(self) -> None:
        for line in self._child.stdout or ():
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
            self.build_failed = self.build_failed or bool(BUILD_FAILED.search(line))


def follow(child: subprocess.Popen[bytes], url: str, output: Output) -> None:
    """Print state changes until the fleet is ready or the child has ended."""
    started, shown = time.monotonic(), ""
    while child.poll() is None:
        if output.build_failed:
            print("error: the application could not be built, see above", file=sys.stderr)
            child.send_signal(signal.SIGINT)
            return
        status, health = fetch(f"{url}/health")
        states = health.get("slms", {}) if health else {}
        line = "  ".join(f"{slm}: {state}" for slm, state in states.items())
        if line and line != shown:
            shown = line
            print(f"[{time.monotonic() - started:5.1f} s] {line}", flush=True)
        if status == 200 and states:
            print(ready_line(url, time.monotonic() - started), flush=True)
            return
        time.sleep(POLL_S)


def ready_line(url: str, elapsed_s: float) -> str:
    """Return the ready line and a command to try."""
    message = {"role": "user", "content": "bash command to find all log files in /var"}
    body = json.dumps({"model": "auto", "messages": [message]})
    return (
        f"ready after {elapsed_s:.0f} s. Try:\n"
        f"  curl -i {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
    )


def fetch(url: str) -> tuple[int, dict[str, Any]]:
    """GET a JSON document and return (status, document); status 0 without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.load(error)
        except ValueError:
            return error.code, {}
    except (OSError, ValueError):
        return 0, {}


def port_taken(url: str) -> bool:
    """Return whether a server already answers at `url`."""
    return fetch(f"{url}/health")[0] != 0


if __name__ == "__main__":
    sys.exit(main())
