"""One SLM: a Serve deployment around a vLLM engine, with multiplexed LoRA adapters."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

import psutil
import ray
from ray import serve

from calm_serve.config import SLMSpec
from calm_serve.errors import UnknownModelError
from deployments.slm.adapters import ResidentAdapter
from deployments.slm.answer import Answerer
from deployments.slm.autoscaling import record_ongoing
from deployments.slm.energy import ReplicaEnergy
from deployments.slm.http_server import HttpServer
from deployments.slm.serve_account import ServeAccount
from deployments.slm.sleep import ReplicaResidency, follow_desired_residency
from deployments.slm.stall import STALL_S, StallDetector
from deployments.slm.state_reporter import StateReporter
from deployments.slm.warm_up import warm_up
from deployments.wire import ReplicaAddress, served_name

log = logging.getLogger("ray.serve")

TICK_S = 1.0
ENGINE_CHECK_S = 0.1  # Serve's own health checks take seconds to find that an engine is dead
# Statistics are rounded: each change of the dict makes Serve broadcast every replica again.
ROUND_RATIO, ROUND_BYTES = 0.05, 32 << 20


class SLM:
    """A replica: starts the engine, warms it up, answers, reports its state and its energy."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, spec: SLMSpec, app_name: str
    ) -> None:
        context = serve.get_replica_context()
        self._spec = spec
        self._replica_id = context.replica_id.unique_id
        self._reporter = StateReporter(app_name, spec.id, self._replica_id)
        self._times: dict[str, float] = {}
        started = time.perf_counter()
        try:
            await self._start(app_name)
        except Exception as error:  # reported to the operator before Serve retries
            self._reporter.report("failed", detail=f"{type(error).__name__}: {error}")
            raise
        self._times["total"] = time.perf_counter() - started
        self._reporter.report("ready", self._times)
        log.info("SLM %s ready: %s", spec.id, self._times)
        self._tasks = [
            asyncio.create_task(self._tick()),
            asyncio.create_task(self._check_engine_until_dead()),
            asyncio.create_task(follow_desired_residency(app_name, spec.id, self._residency)),
        ]

    async def _start(self, app_name: str) -> None:
        self._reporter.report("importing")
        with self._timed("import"):
            from deployments.slm.engine.engine import Engine, EngineDeadError, RequestFacts
        self._dead_error = EngineDeadError
        self._reporter.report("starting engine", self._times)
        with self._timed("engine"):
            self._engine = await Engine.start(self._spec)
        self._processes = [psutil.Process(), *(psutil.Process(p) for p in self._engine.pids())]
        self._replica_energy = ReplicaEnergy(self._spec.resources, lambda: self._processes)
        self._memory_bytes = 0
        self._residency = ReplicaResidency(self._engine, self._report_residency)
        self._secret = secrets.token_hex(16)
        self._account = ServeAccount(app_name)
        self._stall = StallDetector(time.monotonic)
        self._answerer = Answerer(
            self._spec,
            self._replica_id,
            self._secret,
            self._engine,
            facts=RequestFacts,
            account=self._account,
            residency=self._residency,
            energy=self._replica_energy.account,
            load_adapter=lambda name: self.load_adapter(name),  # type: ignore[attr-defined]
            check_engine=self._check_engine,
        )
        self._server = HttpServer(self._answerer, ray.util.get_node_ip_address())
        self._reporter.report("warming up", self._times)
        with self._timed("warmup"):
            await warm_up(self._engine, self._spec)
        await self._server.start()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Read once by Serve, which tells every handle: where the replica listens."""
        return dict(ReplicaAddress(url=self._server.url, secret=self._secret))

    async def ready(self) -> None:
        """Return. A call waits in Serve until there is a replica, and so lets Serve start one."""

    async def _load_adapter(self, name: str) -> ResidentAdapter:
        adapter = next((a for a in self._spec.adapters if a.name == name), None)
        if adapter is None:
            raise UnknownModelError(f"SLM {self._spec.id!r} has no adapter {name!r}")
        full = served_name(self._spec.id, name)
        await self._engine.load_adapter(full, adapter.path)
        return ResidentAdapter(full, self._engine, asyncio.get_running_loop())

    def record_routing_stats(self) -> dict[str, Any]:
        """Polled by Serve: the engine's load, coarse enough not to change at every poll."""
        load = self._engine.load
        return {
            "running": load.running,
            "waiting": load.waiting,
            "kv_usage_ratio": round(load.kv_usage_ratio / ROUND_RATIO) * ROUND_RATIO,
            "cached_prefix_ratio": round(load.cached_prefix_ratio / ROUND_RATIO) * ROUND_RATIO,
            # Plain tuples: Serve's controller need not have this package.
            "recent_prompts": [tuple(prompt) for prompt in self._answerer.recent_prompts],
            "memory_bytes": self._memory_bytes // ROUND_BYTES * ROUND_BYTES,
        }

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Polled by Serve where the SLM is autoscaled; see `autoscaling`."""
        return record_ongoing(self._account.ongoing)

    async def check_health(self) -> None:
        """Raise when the engine is dead or does not wake; Serve then replaces the replica."""
        self._residency.check_health()
        await self._engine.check_health()

    async def _check_engine_until_dead(self) -> None:
        while self._residency.state != "failed":
            await self._check_engine()
            await asyncio.sleep(ENGINE_CHECK_S)

    async def _check_engine(self) -> None:
        try:
            await self._engine.check_health()
        except self._dead_error as error:
            self._residency.on_engine_death(str(error))
        stalled_s = self._stall.stalled_s(self._answerer.in_engine, self._engine.load.steps)
        if stalled_s >= STALL_S:
            self._residency.on_engine_death(f"no step for {stalled_s:.0f} s")

    def _report_residency(self, state: str, times: Mapping[str, float], detail: str) -> None:
        self._times |= times
        self._reporter.report(state, self._times, detail)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if report := self._replica_energy.tick():
                self._reporter.energy(report)
            self._memory_bytes = sum(_memory_bytes(p) for p in self._processes)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Any:
        started = time.perf_counter()
        yield
        self._times[name] = time.perf_counter() - started

    def __del__(self) -> None:
        for task in getattr(self, "_tasks", ()):
            task.get_loop().call_soon_threadsafe(task.cancel)
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.shutdown()


def slm_class(max_resident_adapters: int) -> type[SLM]:
    """SLM with Serve's multiplexing set to this many resident adapters.

    `@serve.multiplexed` takes its limit when the class is made, hence one class per limit.
    """

    class MultiplexedSLM(SLM):
        @serve.multiplexed(max_num_models_per_replica=max_resident_adapters)
        async def load_adapter(self, name: str) -> ResidentAdapter:
            return await self._load_adapter(name)

    return MultiplexedSLM


def _memory_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    # Resident minus shared: the memory that would be free if the process ended (forks share the
    # imports).
    return int(memory.rss - memory.shared)
