"""A vLLM engine with vLLM's OpenAI layer, and the facts of each request.

Only this room imports vLLM, so an upgrade of vLLM changes only this room. Pinned to vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import multiprocessing
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, fields
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import State
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from calm_serve.config import SLMSpec, error_field, first_error
from calm_serve.errors import CalmError, ComponentError, RequestError, openai_error
from deployments.slm.engine.forked_core import fork_cores
from deployments.slm.engine.metrics import BatchedStatLogger, EngineLoad, load_logger
from deployments.slm.engine.sleep import fall_asleep, sleep_arguments, wake_up

__all__ = ["Engine", "EngineDeadError", "EngineLoad", "RequestFacts"]

EVENTS_PER_S = 500  # of all streams of a replica together
MAX_SPACING_S = 0.05  # between two events of a stream
MIN_WAIT_S = 0.0015  # no timer for a shorter wait: it is less than a step of the smallest models
_ERROR_EVENT = 'data: {"error"'
_ENGINE_FIELDS = frozenset(f.name for f in fields(AsyncEngineArgs))


@dataclass(slots=True)
class RequestFacts:
    """Facts of one request from the engine, filled while it runs. Times in seconds."""

    started: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    finished: bool = False  # the engine has no more tokens for it
    keep_text: bool = False
    text: list[str] = field(default_factory=list)  # of the first choice, for validators


_facts: contextvars.ContextVar[RequestFacts | None] = contextvars.ContextVar("facts", default=None)


class _ObservedLLM(AsyncLLM):  # type: ignore[misc]  # vLLM ships no types
    """AsyncLLM that records each request's facts in the caller's RequestFacts.

    It also limits the events of all streams together to EVENTS_PER_S. An event costs less in the
    engine than in the processes between it and the client, so with many streams each sends several
    tokens per event: vLLM merges them while they wait. The first token never waits.
    """

    load: EngineLoad | None = None

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        facts = _facts.get()
        async for output in super().generate(*args, **kwargs):
            if facts is not None:
                _observe(facts, output)
            taken_s = time.perf_counter()
            yield output
            if not output.finished and self.load is not None:
                others = self.load.running - 1
                spacing_s = min(others / EVENTS_PER_S, MAX_SPACING_S)
                wait_s = taken_s + spacing_s - time.perf_counter()
                if wait_s > MIN_WAIT_S:
                    await asyncio.sleep(wait_s)


class Engine:
    """One SLM's vLLM engine with vLLM's own OpenAI serving layer."""

    def __init__(self, spec: SLMSpec, llm: AsyncLLM, state: State, load: EngineLoad) -> None:
        self.spec = spec
        self.load = load
        self.asleep = False
        self._llm = llm
        self._chat = state.openai_serving_chat
        self._completion = state.openai_serving_completion
        self._models = state.openai_serving_models

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
        state = State()
        frontend = vars(FrontendArgs())
        own = {k: v for k, v in spec.engine.items() if k in frontend}
        namespace = Namespace(**(frontend | vars(args) | own))
        await init_app_state(llm, state, namespace, supported_tasks=await llm.get_supported_tasks())
        return cls(spec, llm, state, load)

    async def chat(self, body: dict[str, Any], facts: RequestFacts) -> AsyncIterator[bytes]:
        """Yield a `/v1/chat/completions` answer: SSE events, or one JSON document.

        Raises CalmError, before the first item, for a request that the engine rejects.
        """
        first, is_first = b"", bool(body.get("stream"))
        async for chunk in self._run(ChatCompletionRequest, self._chat_call, body, facts):
            if is_first:
                # It has the role only; it is sent together with the event of the first text.
                first, is_first = chunk, False
                continue
            yield first + chunk
            first = b""
        if first:
            yield first

    async def complete(self, body: dict[str, Any], facts: RequestFacts) -> AsyncIterator[bytes]:
        """Yield a `/v1/completions` answer; see `chat`."""
        async for chunk in self._run(CompletionRequest, self._completion_call, body, facts):
            yield chunk

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

    async def _chat_call(self, request: ChatCompletionRequest) -> Any:
        return await self._chat.create_chat_completion(request, None)

    async def _completion_call(self, request: CompletionRequest) -> Any:
        return await self._completion.create_completion(request, None)

    async def _run(
        self,
        protocol: type[Any],
        call: Callable[[Any], Any],
        body: dict[str, Any],
        facts: RequestFacts,
    ) -> AsyncIterator[bytes]:
        token = _facts.set(facts)
        try:
            answer = await call(_parse(protocol, body))
        except (EngineDeadError, asyncio.CancelledError, CalmError):
            raise
        except Exception as error:  # noqa: BLE001  # vLLM's table maps any exception to a status
            answer = create_error_response(error)
        finally:
            _facts.reset(token)
        if isinstance(answer, ErrorResponse):
            raise _error_of(answer)
        if hasattr(answer, "__aiter__"):
            # The engine's generator is created lazily, on the first iteration.
            token = _facts.set(facts)
            async for event in answer:
                if event.startswith(_ERROR_EVENT):
                    # vLLM would end the stream with [DONE] as if the answer were complete.
                    raise _error_of(ErrorResponse.model_validate_json(event[len("data: ") :]))
                yield event.encode()
        else:
            yield answer.model_dump_json(exclude_none=False).encode()


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


def _observe(facts: RequestFacts, output: Any) -> None:
    facts.finished = output.finished
    if not facts.ttft_s:
        facts.ttft_s = time.perf_counter() - facts.started
        facts.prompt_tokens = len(output.prompt_token_ids or ())
        facts.cached_tokens = output.num_cached_tokens or 0
    if facts.keep_text and output.outputs and output.outputs[0].index == 0:
        facts.text.append(output.outputs[0].text)
    if output.metrics is not None:
        # An answer that is not streamed arrives at its end; the engine measured its first token.
        facts.ttft_s = output.metrics.first_token_latency or facts.ttft_s
        facts.output_tokens = output.metrics.num_generation_tokens
        facts.queue_s = max(0.0, output.metrics.scheduled_ts - output.metrics.queued_ts)


def _parse(protocol: type[Any], body: dict[str, Any]) -> Any:
    try:
        return protocol(**body)
    except ValidationError as error:
        # Not counted: vLLM tries each kind of message, and one wrong message fails them all.
        message = first_error("", error, counted=False)
        raise RequestError(message, param=error_field(error) or None) from error


def _error_of(answer: ErrorResponse) -> CalmError:
    status = HTTPStatus(answer.error.code)
    kind = RequestError if status < HTTPStatus.INTERNAL_SERVER_ERROR else ComponentError
    error = kind(answer.error.message, param=answer.error.param)
    error.http_status = int(status)
    return error


def error_body(error: CalmError) -> bytes:
    """Return OpenAI's error document for `error`, encoded."""
    return json.dumps(
        openai_error(error.message, error.error_type, error.param, error.code)
    ).encode()
