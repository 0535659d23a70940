"""How an engine gives its weights and its KV cache back, and takes them again.

On GPUs that is vLLM's sleep mode. On CPU vLLM has none: its `sleep` does nothing, and then
`is_sleeping` says True. So here the worker gets two methods. Weights go to a file and their pages
to the kernel, while every tensor keeps its address; on waking, the same bytes are read back into
place. Nothing is imported, compiled or prepared a second time. Pinned to vLLM 0.32.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

Span = tuple[int, int]
"""First address and length in bytes of the whole pages of a tensor's memory."""

Product = tuple[Any, torch.dtype]
"""vLLM's handler of one oneDNN matrix product, and the type of its weight."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_MADV_DONTNEED = 4
_READ_BACK_ROWS = 256
_CACHED_PRIMITIVES = 32  # as in vLLM's own call


def sleep_arguments() -> dict[str, Any]:
    """Engine arguments without which the engine cannot sleep."""
    if current_platform.is_cpu():
        return {"worker_extension_cls": f"{__name__}.{SleepingWorker.__name__}"}
    return {"enable_sleep_mode": current_platform.is_sleep_mode_available()}


async def fall_asleep(llm: Any) -> None:
    """Let running requests end, forget the prefix cache, give the memory back.

    Requests that still reach the engine wait in it. When this raises, the engine is awake.
    """
    if not current_platform.is_cpu():
        await llm.sleep(level=1, mode="wait")
        return
    await llm.pause_generation(mode="wait")
    try:
        await llm.collective_rpc("release_memory")
    except Exception:  # whatever it was: a paused engine would hold requests for ever
        await llm.resume_generation()
        raise


async def wake_up(llm: Any) -> None:
    """Take the memory again. When this raises, the engine is of no use any more."""
    if not current_platform.is_cpu():
        await llm.wake_up()
        return
    await llm.collective_rpc("restore_memory")
    await llm.resume_generation()


class SleepingWorker:
    """What vLLM mixes into its CPU worker (`worker_extension_cls`), called by `collective_rpc`."""

    model_runner: Any

    def release_memory(self) -> int:
        """Save what cannot be had again, then let go of it all; return the bytes let go.

        Raises OSError when the file cannot be written; nothing has been let go then.
        """
        if not hasattr(self, "_memory"):
            self._memory = _Memory()
        return self._memory.release(self.model_runner.get_model(), self.model_runner.kv_caches)

    def restore_memory(self) -> None:
        """Put everything back where it was; the KV cache comes back empty."""
        self._memory.restore()


class _Memory:
    """The memory of one worker's model: in place, or let go with what is needed in files."""

    def __init__(self) -> None:
        self._weights, self._state, self._products = _File(), _File(), _Products()
        self._saved: tuple[Span, ...] = ()  # weights that the file holds
        self._changing: tuple[Span, ...] = ()

    def release(self, model: torch.nn.Module, kv_caches: Iterable[Any]) -> int:
        cache = dict.fromkeys(_spans(list(kv_caches)))
        fixed, changing = dict(cache), dict(cache)
        products: list[Product] = []
        for module in model.modules():
            left = getattr(module, "weight", None)  # empty once packed, but of the right type
            for name, value in vars(module).items():
                # What a function holds is weights too, packed for the CPU's matrix units.
                is_fixed = name == "_parameters" or callable(value)
                (fixed if is_fixed else changing).update(dict.fromkeys(_spans(value)))
                if isinstance(left, torch.Tensor):
                    found = (h for h in _held(value) if isinstance(h, ops.CPUDNNLGEMMHandler))
                    products += ((h, left.dtype) for h in found)
        weights = tuple(s for s in fixed if s not in cache)
        self._changing = tuple(s for s in changing if s not in fixed)
        if weights != self._saved:  # they do not change while they serve
            self._saved = ()
            self._weights.write(_view(*s) for s in weights)
            self._saved = weights
        self._state.write(_view(*s) for s in self._changing)  # LoRA slots do
        self._products.save(products)
        spans = (*fixed, *self._changing)
        try:
            for start, length in spans:
                _let_go(start, length)
        except OSError:
            self._restore_spans()
            raise
        freed: int = sum(length for _, length in spans) + self._products.release()
        ctypes.CDLL(None).malloc_trim(0)
        return freed

    def restore(self) -> None:
        self._restore_spans()
        self._products.restore()

    def _restore_spans(self) -> None:
        self._weights.read(_view(*s) for s in self._saved)
        self._state.read(_view(*s) for s in self._changing)


class _Products:
    """oneDNN's matrix products: each keeps its packed weight in memory that is no tensor's."""

    def __init__(self) -> None:
        self._file = _File()
        self._saved: list[Product] = []
        self._pointers: list[torch.Tensor] = []

    def save(self, products: list[Product]) -> None:
        if products != self._saved:
            self._saved = []
            self._file.write(self._weights_of(products))
            self._saved = products

    def release(self) -> int:
        """Free the packed weights; return their bytes."""
        self._pointers = [handler.handler_tensor for handler, _ in self._saved]
        for handler, _ in self._saved:
            handler.dtor(handler.handler_tensor.item())
            handler.handler_tensor = None  # so that it is not released again
        return sum(handler.n * handler.k * dtype.itemsize for handler, dtype in self._saved)

    def restore(self) -> None:
        self._file.read(self._places())

    def _places(self) -> Iterator[memoryview]:
        for (handler, dtype), pointer in zip(self._saved, self._pointers, strict=True):
            weight = torch.empty(handler.n, handler.k, dtype=dtype)
            yield _bytes_of(weight)  # the file is read into it before we go on
            made = ops.create_onednn_mm(weight.t(), _CACHED_PRIMITIVES)
            handler.handler_tensor = pointer.copy_(made.handler_tensor)
            made.handler_tensor = None  # the old handler owns it now

    def _weights_of(self, products: list[Product]) -> Iterator[memoryview]:
        for handler, dtype in products:
            # vLLM has dropped the weight itself. Its product with the identity is the weight,
            # exactly: every sum has one term that is not zero.
            parts = []
            for start in range(0, handler.k, _READ_BACK_ROWS):
                rows = torch.zeros(min(_READ_BACK_ROWS, handler.k - start), handler.k, dtype=dtype)
                rows.diagonal(start).fill_(1.0)
                parts.append(ops.onednn_mm(handler, rows, None))
            weight = torch.cat(parts).t().contiguous()
            yield _bytes_of(weight)  # is written before we go on


class _File:
    """Bytes in a file that has no name and goes with its process."""

    def __init__(self) -> None:
        # Not /tmp by default: where that is kept in memory, nothing would come free.
        folder = os.environ.get("TMPDIR") or "/var/tmp"
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def write(self, views: Iterable[memoryview]) -> None:
        """Replace the file's bytes. Raises OSError, as when the disk is full."""
        self._file.seek(0)
        self._file.truncate()
        for view in views:
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])

    def read(self, views: Iterable[memoryview]) -> None:
        """Fill the views, in the order and the sizes in which they were written."""
        self._file.seek(0)
        for view in views:
            done = 0
            while done < len(view):
                count = self._file.readinto(view[done:])
                if not count:
                    raise OSError("the file of a sleeping engine is too short")
                done += count


def _held(value: Any) -> Iterator[Any]:
    """What an attribute holds: itself, its items, the variables of a function."""
    if isinstance(value, dict):
        value = list(value.values())
    elif inspect.isfunction(value):
        value = [cell.cell_contents for cell in value.__closure__ or ()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _held(item) if isinstance(item, list | tuple) else (item,)
    else:
        yield value


def _spans(value: Any) -> Iterator[Span]:
    for item in _held(value):
        if isinstance(item, torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            start = -(-storage.data_ptr() // _PAGE) * _PAGE
            length = (storage.data_ptr() + storage.nbytes()) // _PAGE * _PAGE - start
            if length > 0:
                yield start, length


def _view(start: int, length: int) -> memoryview:
    return memoryview((ctypes.c_char * length).from_address(start)).cast("B")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return _view(tensor.data_ptr(), tensor.nbytes)


def _let_go(start: int, length: int) -> None:
    # Private pages without a file read as zeros afterwards, which is what an empty KV cache holds.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")
