"""One SLM: a Serve deployment around a vLLM engine, with multiplexed LoRA adapters."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import psutil
from ray import serve

from calm_serve.config import SLMSpec
from calm_serve.errors import AsleepError, CalmError, ComponentError, UnknownModelError
from calm_serve.types import EngineFacts, QualitySignal
from calm_serve.validation import validate
from deployments.slm.adapters import ResidentAdapter
from deployments.slm.energy import ReplicaEnergy
from deployments.slm.sleep import ReplicaResidency, follow_desired_residency
from deployments.slm.state_reporter import StateReporter
from deployments.wire import ErrorReply, Hints, ReplyEnd

log = logging.getLogger("ray.serve")

TICK_S = 1.0
ENGINE_CHECK_S = 0.1  # Serve's own health checks take seconds to find that an engine is dead
MAX_KEPT_CHARS = 65_537  # one more than the validators accept, so that a truncated answer fails
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
        self._calls = itertools.count()
        started = time.perf_counter()
        try:
            await self._start()
        except Exception as error:  # reported to the operator before Serve retries
            self._reporter.report("failed", detail=f"{type(error).__name__}: {error}")
            raise
        self._times["total"] = time.perf_counter() - started
        self._reporter.report("ready", self._times)
        log.info("SLM %s ready: %s", spec.id, self._times)
        self._residency = ReplicaResidency(self._engine, self._report_residency)
        self._tasks = [
            asyncio.create_task(self._tick()),
            asyncio.create_task(self._check_engine_until_dead()),
            asyncio.create_task(follow_desired_residency(app_name, spec.id, self._residency)),
        ]

    async def _start(self) -> None:
        self._reporter.report("importing")
        with self._timed("import"):
            from deployments.slm.engine.engine import (
                Engine,
                EngineDeadError,
                RequestFacts,
                error_body,
            )
        self._dead_error, self._facts_type, self._error_body = (
            EngineDeadError,
            RequestFacts,
            error_body,
        )
        self._reporter.report("starting engine", self._times)
        with self._timed("engine"):
            self._engine = await Engine.start(self._spec)
        self._processes = [psutil.Process(), *(psutil.Process(p) for p in self._engine.pids())]
        self._replica_energy = ReplicaEnergy(self._spec.resources, lambda: self._processes)
        self._energy = self._replica_energy.account
        self._memory_bytes = 0
        self._reporter.report("warming up", self._times)
        with self._timed("warmup"):
            await self._warm_up()

    async def _warm_up(self) -> None:
        body = {
            "model": self._spec.id,
            "messages": [{"role": "user", "content": "Warm up: list 3 words."}],
            "max_tokens": 4,
        }
        for extra in ({}, {"stream": True}):
            async for _ in self._engine.chat({**body, **extra}, self._facts_type()):
                pass
        for adapter in self._spec.adapters[:1]:
            # The first use of any adapter compiles kernels; do it now, not in a client's request.
            name = self._full_name(adapter.name)
            await self._engine.load_adapter(name, adapter.path)
            async for _ in self._engine.chat({**body, "model": name}, self._facts_type()):
                pass
            await self._engine.unload_adapter(name)

    async def chat(self, body: dict[str, Any], hints: Hints | None = None) -> AsyncIterator[Any]:
        """Answer a `/v1/chat/completions` body; see `wire` for what is yielded."""
        async for item in self._answer(body, hints or {}, self._engine.chat):
            yield item

    async def complete(
        self, body: dict[str, Any], hints: Hints | None = None
    ) -> AsyncIterator[Any]:
        """Answer a `/v1/completions` body."""
        async for item in self._answer(body, hints or {}, self._engine.complete):
            yield item

    async def _answer(self, body: dict[str, Any], hints: Hints, call: Any) -> AsyncIterator[Any]:
        adapter = hints.get("adapter", "")
        try:
            # Loading an adapter needs the engine's memory too.
            async with self._residency.awake(hints.get("residency_revision")):
                if not adapter:
                    async for item in self._serve({**body, "model": self._spec.id}, hints, call):
                        yield item
                    return
                resident = await self.load_adapter(adapter)  # type: ignore[attr-defined]
                with resident.in_use():
                    async for item in self._serve({**body, "model": resident.name}, hints, call):
                        yield item
        except CalmError as error:
            await self._check_engine()
            yield ErrorReply(
                error.http_status,
                self._error_body(error),
                asleep=isinstance(error, AsleepError),
                dead_replica=self._replica_id if self._residency.state == "failed" else "",
            )

    async def _serve(self, body: dict[str, Any], hints: Hints, call: Any) -> AsyncIterator[Any]:
        kinds = {hints.get("validate", ""), self._spec.validator} - {""}
        facts = self._facts_type(keep_text=bool(kinds))
        key = str(next(self._calls))
        self._energy.start(key)
        counted, last = 0, b""
        finished = False
        # The chunks after the last token come at once; they go out with the facts, in one message.
        stream = bool(body.get("stream"))
        try:
            async for chunk in call(body, facts):
                self._energy.add_tokens(key, facts.output_tokens - counted)
                counted = facts.output_tokens
                if stream and not facts.finished:
                    yield chunk
                else:
                    last += chunk
            finished = True
        except self._dead_error as error:
            raise ComponentError(f"engine of {self._spec.id!r} died: {error}") from error
        finally:
            self._energy.add_tokens(key, max(0, facts.output_tokens - counted))
            energy = self._energy.finish(key)
            if not finished:
                log.info(
                    "request %s ended with an incomplete answer", hints.get("decision_id", "?")
                )
        signals: tuple[QualitySignal, ...] = ()
        if kinds:
            # In a thread: checking against a client's schema may take a while.
            signals = await asyncio.to_thread(self._signals, facts, hints, kinds, _limit(body))
        yield ReplyEnd(last, self._facts(facts, energy), signals)

    def _facts(self, facts: Any, energy: Any) -> EngineFacts:
        load = self._engine.load
        return EngineFacts(
            replica_id=self._replica_id,
            prompt_tokens=facts.prompt_tokens,
            cached_tokens=facts.cached_tokens,
            output_tokens=facts.output_tokens,
            queue_s=facts.queue_s,
            ttft_s=facts.ttft_s,
            energy_j=energy.energy_j,
            energy_source=energy.source,
            running=load.running,
            waiting=load.waiting,
            kv_usage_ratio=load.kv_usage_ratio,
        )

    def _signals(
        self, facts: Any, hints: Hints, kinds: set[str], limit_tokens: int | None
    ) -> tuple[QualitySignal, ...]:
        if limit_tokens is not None and facts.output_tokens >= limit_tokens:
            kinds = kinds & {
                hints.get("validate")
            }  # the client's limit may have truncated the answer: no failure of the SLM
        text = "".join(facts.text)[:MAX_KEPT_CHARS]
        signals = []
        for kind in sorted(kinds):
            signal = validate(
                kind, text, schema=hints.get("schema"), labels=hints.get("labels", ())
            )
            # That an answer has its SLM's own format is no evidence unless the client asked for it:
            # a well-formed SQL answer to a request for a poem is wrong. A malformed one always is.
            if kind == hints.get("validate") or signal.value < 1.0:
                signals.append(signal)
        return tuple(signals)

    async def _load_adapter(self, name: str) -> ResidentAdapter:
        adapter = next((a for a in self._spec.adapters if a.name == name), None)
        if adapter is None:
            raise UnknownModelError(f"SLM {self._spec.id!r} has no adapter {name!r}")
        full = self._full_name(name)
        await self._engine.load_adapter(full, adapter.path)
        return ResidentAdapter(full, self._engine, asyncio.get_running_loop())

    def _full_name(self, adapter: str) -> str:
        return f"{self._spec.id}:{adapter}"

    def record_routing_stats(self) -> dict[str, Any]:
        """Polled by Serve: the engine's load, coarse enough not to change at every poll."""
        load = self._engine.load
        return {
            "running": load.running,
            "waiting": load.waiting,
            "kv_usage_ratio": round(load.kv_usage_ratio / ROUND_RATIO) * ROUND_RATIO,
            "cached_prefix_ratio": round(load.cached_prefix_ratio / ROUND_RATIO) * ROUND_RATIO,
            "memory_bytes": self._memory_bytes // ROUND_BYTES * ROUND_BYTES,
        }

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


def _limit(body: dict[str, Any]) -> int | None:
    """Output tokens that the client asked for at most; the engine has accepted the body."""
    return body.get("max_completion_tokens") or body.get("max_tokens")


def _memory_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    # Resident minus shared: the memory that would be free if the process ended (forks share the
    # imports).
    return int(memory.rss - memory.shared)
