"""Sleep and wake-up of an engine: weights and KV cache are released and restored in place.

On GPUs this is vLLM's sleep mode. On CPU vLLM has none: its `sleep` does nothing, and `is_sleeping`
then returns True. There the worker gets two methods: weights are written to a file and their pages
returned to the kernel, while every tensor keeps its address; on wake-up the same bytes are read
back into place. Nothing is imported, compiled or packed again. Pinned to vLLM 0.32.
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
"""First address and length in bytes of the whole pages inside a tensor's memory."""

Product = tuple[Any, torch.dtype]
"""vLLM's handler of one oneDNN matrix product, and its weight's type."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_MADV_DONTNEED = 4
_READ_BACK_ROWS = 256  # of a packed weight at once, which bounds the extra memory
_CACHED_PRIMITIVES = 32  # as in vLLM's own call


def sleep_arguments() -> dict[str, Any]:
    """Return engine arguments that sleep requires."""
    if current_platform.is_cpu():
        return {"worker_extension_cls": f"{__name__}.{SleepingWorker.__name__}"}
    return {"enable_sleep_mode": current_platform.is_sleep_mode_available()}


async def fall_asleep(llm: Any) -> None:
    """Wait for running requests, clear the prefix cache, release the memory.

    Requests that reach the engine meanwhile wait inside it. If this raises, the engine is awake.
    """
    if not current_platform.is_cpu():
        await llm.sleep(level=1, mode="wait")
        return
    await llm.pause_generation(mode="wait")
    try:
        await llm.collective_rpc("release_memory")
    except Exception:  # any error: a paused engine would never answer its requests
        await llm.resume_generation()
        raise


async def wake_up(llm: Any) -> None:
    """Restore the memory. If this raises, the engine is unusable and must be restarted."""
    if not current_platform.is_cpu():
        await llm.wake_up()
        return
    await llm.collective_rpc("restore_memory")
    await llm.resume_generation()


class SleepingWorker:
    """Methods that vLLM mixes into its CPU worker (`worker_extension_cls`) for `collective_rpc`."""

    model_runner: Any

    def release_memory(self) -> int:
        """Save what cannot be recomputed, then release all memory; return the released bytes.

        Raises OSError when the file cannot be written; then nothing was released.
        """
        if not hasattr(self, "_memory"):
            self._memory = _Memory()
        return self._memory.release(self.model_runner.get_model(), self.model_runner.kv_caches)

    def restore_memory(self) -> None:
        """Restore everything in place, except the KV cache, which is empty."""
        self._memory.restore()


class _Memory:
    """The memory of one worker's model: in place, or released with its contents in files."""

    def __init__(self) -> None:
        self._weights, self._state, self._products = _SpillFile(), _SpillFile(), _MatrixProducts()
        self._saved: tuple[Span, ...] = ()  # weights in the file
        self._changing: tuple[Span, ...] = ()

    def release(self, model: torch.nn.Module, kv_caches: Iterable[Any]) -> int:
        cache = dict.fromkeys(_spans(list(kv_caches)))
        fixed, changing = dict(cache), dict(cache)
        products: list[Product] = []
        for module in model.modules():
            weight = getattr(module, "weight", None)  # empty once packed, but its type is kept
            for name, value in vars(module).items():
                # Tensors in a closure are weights too, packed for the CPU's matrix units.
                is_fixed = name == "_parameters" or callable(value)
                (fixed if is_fixed else changing).update(dict.fromkeys(_spans(value)))
                if isinstance(weight, torch.Tensor):
                    handlers = (
                        h for h in _contents(value) if isinstance(h, ops.CPUDNNLGEMMHandler)
                    )
                    products += ((h, weight.dtype) for h in handlers)
        weights = tuple(s for s in fixed if s not in cache)
        self._changing = tuple(s for s in changing if s not in fixed)
        if weights != self._saved:  # weights do not change, so they are written once
            self._saved = ()
            self._weights.write(_view(*s) for s in weights)
            self._saved = weights
        self._state.write(_view(*s) for s in self._changing)  # such as LoRA slots
        self._products.save(products)
        spans = (*fixed, *self._changing)
        try:
            for start, length in spans:
                _release_pages(start, length)
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


class _MatrixProducts:
    """oneDNN's matrix products: each has its packed weight in memory outside any tensor."""

    def __init__(self) -> None:
        self._file = _SpillFile()
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
            handler.handler_tensor = None  # so that it is not released twice
        return sum(handler.n * handler.k * dtype.itemsize for handler, dtype in self._saved)

    def restore(self) -> None:
        self._file.read(self._places())

    def _places(self) -> Iterator[memoryview]:
        for (handler, dtype), pointer in zip(self._saved, self._pointers, strict=True):
            weight = torch.empty(handler.n, handler.k, dtype=dtype)
            yield _bytes_of(weight)  # filled from the file before the next line runs
            packed = ops.create_onednn_mm(weight.t(), _CACHED_PRIMITIVES)
            handler.handler_tensor = pointer.copy_(packed.handler_tensor)
            packed.handler_tensor = None  # the old handler owns it now

    def _weights_of(self, products: list[Product]) -> Iterator[memoryview]:
        for handler, dtype in products:
            # vLLM has dropped the unpacked weight. The product with the identity equals it
            # exactly, because every sum has one term that is not zero.
            parts = []
            for start in range(0, handler.k, _READ_BACK_ROWS):
                rows = torch.zeros(min(_READ_BACK_ROWS, handler.k - start), handler.k, dtype=dtype)
                rows.diagonal(start).fill_(1.0)
                parts.append(ops.onednn_mm(handler, rows, None))
            weight = torch.cat(parts).t().contiguous()
            yield _bytes_of(weight)  # written before the next product is computed


class _SpillFile:
    """Bytes in a file without a name, which the kernel removes with the process."""

    def __init__(self) -> None:
        # Not /tmp by default: where that is in memory, no memory would be released.
        folder = os.environ.get("TMPDIR") or "/var/tmp"
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def write(self, views: Iterable[memoryview]) -> None:
        """Replace the file's bytes. Raises OSError, for example when the disk is full."""
        self._file.seek(0)
        self._file.truncate()
        for view in views:
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])

    def read(self, views: Iterable[memoryview]) -> None:
        """Fill the views, in the order and with the sizes in which they were written."""
        self._file.seek(0)
        for view in views:
            done = 0
            while done < len(view):
                count = self._file.readinto(view[done:])
                if not count:
                    raise OSError("the file of a sleeping engine is too short")
                done += count


def _contents(value: Any) -> Iterator[Any]:
    """Yield an attribute's value, or its items, or the variables of a function's closure."""
    if isinstance(value, dict):
        value = list(value.values())
    elif inspect.isfunction(value):
        value = [cell.cell_contents for cell in value.__closure__ or ()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _contents(item) if isinstance(item, list | tuple) else (item,)
    else:
        yield value


def _spans(value: Any) -> Iterator[Span]:
    for item in _contents(value):
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


def _release_pages(start: int, length: int) -> None:
    # Private pages without a file read as zeros afterwards, as an empty KV cache must.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")
