"""The same engine without calm_serve: vLLM's OpenAI server with an SLM's model and settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from calm_serve.config import SLMSpec, parse_fleet
from deployments.slm.environment import process_environment
from load_tests.common.served import FLEETS, ROOT, fleet_file, free_port

READY_S = 600.0
STOP_S, CHILD_STOP_S = 30.0, 5.0


def bare_fleet(ids: Sequence[str]) -> dict[str, Any]:
    """The reference fleet with these SLMs alone, without the work that only calm_serve does.

    No validators, which read whole answers, and no sampling defaults (`engine`): other servers have
    neither.
    """
    fleet = fleet_file("reference")
    fleet["slms"] = [e for e in fleet["slms"] if e["id"] in ids]
    for entry in fleet["slms"]:
        entry.pop("validator", None)
        entry.pop("engine", None)
    fleet["rules"] = [r for r in fleet["rules"] if set(r["slms"]) <= set(ids)]
    fleet["safety"] = []
    return fleet


def specs_of(fleet: Mapping[str, Any]) -> list[SLMSpec]:
    """The fleet's SLMs with every default filled in and the paths of their weights."""
    return list(parse_fleet(fleet, FLEETS).slms)


def arguments(spec: SLMSpec) -> list[str]:
    """Command line of vLLM's server for the engine that an SLM replica would start.

    `tests/integration/parts/test_direct_engine.py` compares the two engines' settings.
    """
    limits = spec.limits
    return [
        *("--model", spec.model),
        *("--served-model-name", spec.id),
        *("--max-model-len", str(spec.context_tokens)),
        *("--max-num-seqs", str(limits.max_num_seqs)),
        *("--max-num-batched-tokens", str(limits.max_num_batched_tokens)),
        *("--dtype", "bfloat16"),
        *("--kv-cache-memory-bytes", str(int(spec.resources.kv_cache_bytes))),
        *("--distributed-executor-backend", "uni"),
        "--enforce-eager",
        "--enable-prefix-caching",
    ]


@contextmanager
def direct(specs: Sequence[SLMSpec]) -> Iterator[dict[str, str]]:
    """Run one vLLM server per SLM until the block ends; yields SLM id to URL.

    They start in parallel. Raises RuntimeError, with the end of its log, for one that does not
    become ready.
    """
    with ExitStack() as stack:
        servers = {}
        for spec in specs:
            port = free_port()
            # The CPU wheel's `vllm serve` does not work.
            command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
            command += [
                *("--host", "127.0.0.1", "--port", str(port)),
                "--disable-uvicorn-access-log",
            ]
            command += [*("--uvicorn-log-level", "warning"), *arguments(spec)]
            environment = process_environment(spec)
            servers[spec.id] = stack.enter_context(
                started(f"vllm {spec.id}", command, f"http://127.0.0.1:{port}", environment)
            )
        for server in servers.values():
            server.wait()
        yield {slm: server.url for slm, server in servers.items()}


class Server:
    """A server process, its URL and its log."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.name = name
        self.process = process
        self.url = url
        self._log = log

    def wait(self, path: str = "/health", ready_s: float = READY_S) -> None:
        """Wait until it answers 200. Raises RuntimeError with the end of its log."""
        deadline = time.monotonic() + ready_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(self.url + path, timeout=5.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        log = self._log.read_text("utf-8", errors="replace")
        raise RuntimeError(f"{self.name} did not become ready:\n{log[-2000:]}")


@contextmanager
def started(
    name: str, command: Sequence[str], url: str, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Run a server process until the block ends, with `environment` added to this process's.

    It stays in this process's session: Linux schedules each session as a group, and a group of one
    busy engine would get as much CPU time as a group of ten processes.
    """
    with tempfile.TemporaryDirectory(prefix="peer", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Server(name, process, url, log)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server and its child processes."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in psutil.wait_procs(children, CHILD_STOP_S)[1]:
        child.kill()  # an engine may survive a server that had to be killed
