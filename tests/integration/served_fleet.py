"""The reference fleet, started and stopped the way users do it, and looked at from outside."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import httpx
import psutil
import yaml
from openai import OpenAI

from calm_serve.knowledge.store import OutcomeStore
from calm_serve.types import Outcome
from deployments.reference_fleet.grading.rows import load
from load_tests.common.served import free_port
from load_tests.common.workloads import request

ROOT = Path(__file__).resolve().parents[2]
FLEET_FILE = ROOT / "deployments" / "fleets" / "reference.yaml"
READY_S = 300.0
STOP_S = 90.0
POLL_S = 0.25
NEVER = 10**9  # labelled outcomes before a training
TWO_REPLICAS = "sql"
INGRESS_PORTS = frozenset(range(30_000, 32_768))  # where routers listen behind the proxy
MARK = "CALM_TEST_RUN"  # in the environment of every process that belongs to this run

T = TypeVar("T")


def eventually(what: str, look: Callable[[], T | None], timeout_s: float = 60.0) -> T:
    """Call `look` until it returns something true; fail with `what` after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)


def prompts(kind: str, *, instructed: bool, count: int, difficulty: str = "") -> list[str]:
    """Held-out prompts of one kind, with an instruction that names the task if `instructed`."""
    rows = [r for r in load(kind) if difficulty in ("", r.difficulty) and r.side == "workload"]
    rng = Random(kind)
    return [
        str(request(row, rng, instructed_ratio=float(instructed)).messages[0]["content"])
        for row in rng.sample(rows, count)
    ]


def reference_config(
    *,
    slms: Sequence[str] = (),
    two_replicas: str = TWO_REPLICAS,
    exploration_ratio: float | None = None,
    learning: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """serve_config.yaml with two routers.

    Args:
        slms: those to serve, all of them when empty; rules for others are left out.
        two_replicas: the SLM that gets two replicas, "" for none.
        exploration_ratio: share of explored choices; None is serve_config.yaml's.
        learning: options of `Learning`; without any, nothing is trained.
    """
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text("utf-8"))
    application = config["applications"][0]
    application["args"]["fleet"] = _part_of_the_fleet(slms) if slms else str(FLEET_FILE)
    if exploration_ratio is not None:
        application["args"]["goals"]["exploration_ratio"] = exploration_ratio
    untaught = {"min_outcomes": NEVER, "retrain_every": NEVER}
    application["args"]["learning"] |= untaught if learning is None else learning
    application["args"]["router"] = {"replicas": 2, "num_cpus": 0.1}
    if two_replicas:
        application["deployments"] = [
            {
                "name": f"slm-{two_replicas}",
                "autoscaling_config": {"min_replicas": 2, "max_replicas": 2},
            }
        ]
    return config


def _part_of_the_fleet(slms: Sequence[str]) -> dict[str, Any]:
    """The fleet file inline with absolute paths, reduced to `slms` and what refers to them."""
    text = FLEET_FILE.read_text("utf-8").replace("../", f"{FLEET_FILE.parents[1]}/")
    fleet: dict[str, Any] = yaml.safe_load(text)
    fleet["slms"] = [s for s in fleet["slms"] if s["id"] in slms]
    fleet["rules"] = [r for r in fleet["rules"] if set(r["slms"]) <= set(slms)]
    fleet["safety"] = [r for r in fleet["safety"] if r["slm"] in slms]
    return fleet


class ServedFleet:
    """One run of `python -m deployments.serve` on ports and folders of its own."""

    def __init__(self, config: dict[str, Any]) -> None:
        # Short: Ray puts Unix sockets below it, whose paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="calm"))
        self.url = f"http://127.0.0.1:{free_port()}"
        self.state_dir = self.folder / "state"
        self.log = self.folder / "serve.log"
        config["http_options"]["port"] = int(self.url.rpartition(":")[2])
        config["applications"][0]["args"]["learning"]["state_dir"] = str(self.state_dir)
        self.config = config
        self.ready_s = 0.0
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(base_url=self.url, timeout=60.0)

    @contextmanager
    def running(self) -> Iterator[ServedFleet]:
        """Start it; stop it at the end, also when it did not become ready or a test failed."""
        try:
            self.start()
            yield self
        finally:
            status = self.stop()
        assert status == 0

    def start(self) -> None:
        """Start and wait until every replica is up."""
        path = self.folder / "serve_config.yaml"
        path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        environment = {
            **os.environ,
            MARK: self._mark,
            "RAY_TMPDIR": str(self.folder),
            # Ray would otherwise write a token file into the home directory.
            "RAY_AUTH_MODE": "disabled",
        }
        started_s = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deployments.serve", str(path)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually("the fleet is ready", self._ready, READY_S)
        self.ready_s = time.monotonic() - started_s

    def stop(self) -> int:
        """End it with Ctrl-C; return the exit status. Fails when a process is left."""
        assert self._process is not None
        self._http.close()
        self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(STOP_S)
            eventually("every process has ended", lambda: not self.processes(), 30.0)
        finally:
            for process in self.processes():
                process.kill()
        shutil.rmtree(self.folder)
        return status

    def processes(self) -> list[psutil.Process]:
        """Every process of this run that is alive."""
        return [p for p in psutil.process_iter() if _environment(p).get(MARK) == self._mark]

    def get(self, path: str) -> Any:
        """GET a JSON document of the endpoint."""
        return self._http.get(path).raise_for_status().json()

    def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None, **options: Any
    ) -> httpx.Response:
        """POST a JSON body to the endpoint."""
        return self._http.post(path, json=body, headers=headers, **options)

    def chat(
        self, text: str, model: str = "auto", headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        """One chat request with one user message."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **body}
        return self.post("/v1/chat/completions", body, headers)

    def route(self, text: str) -> dict[str, Any]:
        """What would be decided for a prompt; nothing runs."""
        body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
        return dict(self.post("/v1/route", body).raise_for_status().json())

    def openai(self) -> OpenAI:
        """The official client, without its retries."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60.0)

    def slm(self, slm_id: str) -> dict[str, Any]:
        """The SLM's row of /v1/fleet; {} when there is none."""
        rows = self.get("/v1/fleet")["slms"]
        return next((dict(r) for r in rows if r["id"] == slm_id), {})

    @contextmanager
    def store(self) -> Iterator[OutcomeStore]:
        """The outcome store, as another process sees it."""
        store = OutcomeStore(f"sqlite:///{self.state_dir / 'outcomes.sqlite'}")
        try:
            yield store
        finally:
            store.close()

    def outcome(self, decision_id: str) -> Outcome:
        """The stored outcome of a decision; waits for it."""
        with self.store() as store:
            return eventually(f"outcome {decision_id}", lambda: store.get(decision_id), 30.0)

    def settle(self) -> None:
        """Wait until no router has an outcome on its way to the store."""

        def pending() -> int:
            fleets = self.each_router("/v1/fleet")
            return sum(int(f["predictor"]["outcomes_pending"]) for f in fleets)

        eventually("every outcome is stored", lambda: not pending(), 30.0)

    @property
    def application(self) -> dict[str, Any]:
        """The configuration of the fleet's own application."""
        return dict(self.config["applications"][0])

    @property
    def replica_counts(self) -> dict[str, int]:
        """SLM to its configured number of replicas."""
        counts = {s["id"]: 1 for s in self._slms}
        for deployment in self.application.get("deployments", ()):
            slm_id = deployment["name"].removeprefix("slm-")
            counts[slm_id] = deployment["autoscaling_config"]["min_replicas"]
        return counts

    @property
    def examples(self) -> dict[str, str]:
        """SLM to a prompt of the kind that it is for."""
        return {s["id"]: s["examples"][0] for s in self._slms}

    @property
    def _slms(self) -> list[dict[str, Any]]:
        fleet = self.application["args"]["fleet"]
        if isinstance(fleet, str):
            fleet = yaml.safe_load(Path(fleet).read_text("utf-8"))
        return list(fleet["slms"])

    def deploy(self, *more: dict[str, Any]) -> None:
        """What `serve deploy` does: put the configuration, with further applications."""
        config = {**self.config, "applications": [*self.config["applications"], *more]}
        url = f"{self.dashboard_url}/api/serve/applications/"
        httpx.put(url, json=config, timeout=60.0).raise_for_status()

    def each_router(self, path: str) -> list[Any]:
        """GET a JSON document of every router that is alive."""
        urls = self.router_urls()
        return [self._http.get(url + path).raise_for_status().json() for url in urls]

    def put(
        self, path: str, body: Any, headers: dict[str, str] | None = None, **options: Any
    ) -> httpx.Response:
        """PUT a JSON body to the endpoint."""
        return self._http.put(path, json=body, headers=headers, **options)

    def applications(self) -> dict[str, Any]:
        """Application to its status, as Serve describes it."""
        status = self._http.get(f"{self.dashboard_url}/api/serve/applications/")
        return dict(status.raise_for_status().json()["applications"])

    def replicas(self) -> dict[str, list[dict[str, Any]]]:
        """Deployment to its running replicas, over all applications."""
        deployments: dict[str, list[dict[str, Any]]] = {}
        for application in self.applications().values():
            for name, deployment in application["deployments"].items():
                running = [r for r in deployment["replicas"] if r["state"] == "RUNNING"]
                deployments[name] = running
        return deployments

    def engine_pids(self, slm_id: str) -> list[int]:
        """Process ids of the engines of an SLM's replicas."""
        replicas = [psutil.Process(r["pid"]) for r in self.replicas()[f"slm-{slm_id}"]]
        return [child.pid for replica in replicas for child in replica.children()]

    def router_urls(self) -> list[str]:
        """Where each router process that is alive answers by itself, past the common endpoint."""
        return [
            f"http://127.0.0.1:{port}"
            for replica in self.replicas()["router"]
            for port in sorted(_open_ports(replica["pid"]) & INGRESS_PORTS)
        ]

    @property
    def dashboard_url(self) -> str:
        """Where Ray's dashboard answers."""
        found = re.search(r"dashboard at \S*?(http://[\d.]+:\d+)", self.log.read_text("utf-8"))
        assert found is not None, self.log.read_text("utf-8")[-2000:]
        return found[1]

    def _ready(self) -> bool:
        assert self._process is not None
        ended = self._process.poll()
        assert ended is None, f"ended with {ended}: {self.log.read_text('utf-8')[-4000:]}"
        try:
            if self._http.get("/health").status_code != 200:
                return False
            rows = self.get("/v1/fleet")["slms"]
        except httpx.HTTPError:
            return False
        return {r["id"]: r["replicas"] for r in rows} == self.replica_counts


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


def _open_ports(pid: int) -> set[int]:
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:  # dead, and Serve has not noticed yet
        return set()
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
