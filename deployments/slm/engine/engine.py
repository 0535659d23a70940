"""A vLLM engine with vLLM's OpenAI layer, and the facts of each request.

Only this room imports vLLM, so an upgrade of vLLM changes only this room. Pinned to vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import multiprocessing
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from calm_serve.config import SLMSpec
from calm_serve.errors import ComponentError
from calm_serve.types import Task
from deployments.slm.engine.forked_core import fork_cores
from deployments.slm.engine.metrics import BatchedStatLogger, EngineLoad, load_logger
from deployments.slm.engine.sleep import fall_asleep, sleep_arguments, wake_up

__all__ = ["Engine", "EngineDeadError", "EngineLoad", "RequestFacts"]

MAX_SPACING_S = 0.05  # between two events of a stream
MIN_WAIT_S = 0.0015  # no timer for a shorter wait: it is less than a step of the smallest models
# The router is the server that clients see; the engine's own is reached by it alone.
OUR_SERVER: dict[str, Any] = {
    "api_key": None,
    "middleware": [],
    "root_path": "",
    "enable_request_id_headers": False,
    "enable_server_load_tracking": False,
}
_ENGINE_FIELDS = frozenset(f.name for f in fields(AsyncEngineArgs))


@dataclass(slots=True)
class RequestFacts:
    """Facts of one request from the engine, filled while it runs. Times in seconds.

    A request may make the engine generate several times: one completion for each of several
    prompts. Counts are sums over them, and over all choices.
    """

    on_tokens: Callable[[int], None]  # called with the number of new output tokens
    keep_text: bool = False
    started: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    text: list[str] = field(default_factory=list)  # of the first choice, for validators


_facts: contextvars.ContextVar[RequestFacts | None] = contextvars.ContextVar("facts", default=None)


class _ObservedLLM(AsyncLLM):  # type: ignore[misc]  # vLLM ships no types
    """AsyncLLM that records each request's facts in the caller's RequestFacts.

    It may also limit the events of all streams together to `events_per_s`. Then, with many streams,
    each sends several tokens per event: vLLM merges them while they wait. The first token never
    waits.
    """

    load: EngineLoad | None = None
    events_per_s: float | None = None

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        params = kwargs.get("sampling_params", args[1] if len(args) > 1 else None)
        repeats = getattr(params, "output_kind", None) is RequestOutputKind.CUMULATIVE
        observe = _observer(_facts.get(), repeats)
        async for output in super().generate(*args, **kwargs):
            observe(output)
            taken_s = time.perf_counter()
            yield output
            if self.events_per_s is not None and not output.finished and self.load is not None:
                spacing_s = min((self.load.running - 1) / self.events_per_s, MAX_SPACING_S)
                wait_s = taken_s + spacing_s - time.perf_counter()
                if wait_s > MIN_WAIT_S:
                    await asyncio.sleep(wait_s)

    async def encode(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        observe = _observer(_facts.get(), repeats=False)
        async for output in super().encode(*args, **kwargs):
            observe(output)
            yield output


class Engine:
    """One SLM's vLLM engine with vLLM's own OpenAI serving layer."""

    def __init__(self, spec: SLMSpec, llm: AsyncLLM, app: FastAPI, load: EngineLoad) -> None:
        self.spec = spec
        self.load = load
        self.app = app  # vLLM's own HTTP application
        self.asleep = False
        self._llm = llm
        self._models = app.state.openai_serving_models

    @classmethod
    async def start(cls, spec: SLMSpec) -> Engine:
        """Load the weights and start the engine. Raises vLLM's errors for a bad model."""
        args = engine_args(spec)
        config = args.create_engine_config()
        if current_platform.is_cpu():
            fork_cores()
        load = EngineLoad()
        llm: _ObservedLLM = _ObservedLLM.from_vllm_config(
            config, stat_loggers=[load_logger(load), BatchedStatLogger]
        )
        llm.load = load
        llm.events_per_s = spec.max_events_per_s
        frontend = vars(FrontendArgs())
        own = {k: v for k, v in spec.engine.items() if k in frontend}
        # As objects: an operator's `engine:` has mappings in their place.
        typed = {"structured_outputs_config": config.structured_outputs_config}
        namespace = Namespace(**(frontend | vars(args) | typed | _tools(spec) | own | OUR_SERVER))
        tasks = await llm.get_supported_tasks()
        app = build_app(namespace, tasks, llm.model_config)
        await init_app_state(llm, app.state, namespace, supported_tasks=tasks)
        return cls(spec, llm, app, load)

    @contextlib.contextmanager
    def observed(self, facts: RequestFacts) -> Iterator[None]:
        """Record in `facts` what the engine does for the requests of this block."""
        token = _facts.set(facts)
        try:
            yield
        finally:
            _facts.reset(token)

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter as `name`. Raises ComponentError when the engine rejects it."""
        answer = await self._models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=name, lora_path=path)
        )
        if isinstance(answer, ErrorResponse):
            raise ComponentError(f"adapter {name!r}: {answer.error.message}")

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter and free its slot."""
        request = self._models.lora_requests.get(name)
        await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        if request is not None:
            await self._llm.engine_core.remove_lora_async(request.lora_int_id)

    async def sleep(self) -> None:
        """Release weights and KV cache when no request runs; later requests wait for `wake`.

        Raises vLLM's errors, and then the engine is awake.
        """
        if not self.asleep:
            await fall_asleep(self._llm)
            self.asleep = True

    async def wake(self) -> None:
        """Restore the state before `sleep`, with an empty prefix cache. Raises vLLM's errors."""
        if self.asleep:
            await wake_up(self._llm)
            self.asleep = False

    async def check_health(self) -> None:
        """Raise EngineDeadError when the engine process has ended."""
        await self._llm.check_health()

    def pids(self) -> list[int]:
        """Process ids of the engine's children."""
        return [p.pid for p in multiprocessing.active_children() if p.pid is not None]

    def shutdown(self) -> None:
        """Stop the engine process."""
        self._llm.shutdown()


def _tools(spec: SLMSpec) -> dict[str, Any]:
    """Return vLLM's server arguments for tool calls."""
    if not (spec.capabilities.tools and spec.tool_parser):
        return {}
    return {"enable_auto_tool_choice": True, "tool_call_parser": spec.tool_parser}


def engine_args(spec: SLMSpec) -> AsyncEngineArgs:
    """Return vLLM's arguments: batching profile, resources, then the operator's `engine:`."""
    limits = spec.limits
    values: dict[str, Any] = {
        "model": spec.model,
        "served_model_name": [spec.id],
        "max_model_len": spec.context_tokens,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        **sleep_arguments(),
    }
    if current_platform.is_cpu():
        values |= {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(spec.resources.kv_cache_bytes),
            "distributed_executor_backend": "uni",
        }
    if spec.task is not Task.GENERATE:
        # Small encoders: vectors in full precision cost little, and encoders cache no prefix.
        values |= {"runner": "pooling", "enable_prefix_caching": False}
        values |= {"dtype": "float32"} if current_platform.is_cpu() else {}
    if spec.adapters:
        values |= {
            "enable_lora": True,
            "max_loras": spec.max_resident_adapters,
            "max_cpu_loras": spec.max_resident_adapters,
            "max_lora_rank": max(_lora_rank(a.path) for a in spec.adapters),
        }
    frontend = vars(FrontendArgs())  # such as tool_call_parser, which are no engine arguments
    own = {k: v for k, v in spec.engine.items() if k not in frontend or k in _ENGINE_FIELDS}
    return AsyncEngineArgs(**(values | own))


def _lora_rank(path: str) -> int:
    rank = int(json.loads(Path(path, "adapter_config.json").read_text(encoding="utf-8"))["r"])
    return max(8, 1 << (rank - 1).bit_length())  # vLLM accepts powers of two from 8


def _observer(facts: RequestFacts | None, repeats: bool) -> Callable[[Any], None]:
    """Return what records the outputs of one generation; `repeats`: each has all tokens so far."""
    if facts is None:
        return lambda _output: None
    before: dict[int, int] = {}  # tokens by choice
    first = True

    def observe(output: Any) -> None:
        nonlocal first
        if first:
            first = False
            facts.ttft_s = facts.ttft_s or time.perf_counter() - facts.started
            facts.prompt_tokens += len(output.prompt_token_ids or ())
            facts.cached_tokens += getattr(output, "num_cached_tokens", 0) or 0
        choices = getattr(output, "outputs", None)
        if not isinstance(choices, list):
            return  # a pooling model makes no tokens
        new = 0
        for choice in choices:
            count = len(choice.token_ids)
            new += count - before.get(choice.index, 0) if repeats else count
            before[choice.index] = count
            if facts.keep_text and choice.index == 0:
                facts.text.append(choice.text)
        facts.output_tokens += new
        facts.on_tokens(new)
        if output.metrics is not None:
            # An answer that is not streamed comes at its end; the engine knows its first token.
            facts.ttft_s = output.metrics.first_token_latency or facts.ttft_s
            facts.queue_s = max(0.0, output.metrics.scheduled_ts - output.metrics.queued_ts)

    return observe
