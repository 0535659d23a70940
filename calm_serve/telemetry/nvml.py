"""Joules of GPUs, from the counter in the driver (NVML, Volta and later).

The module `pynvml` of NVIDIA's binding nvidia-ml-py is passed in, because only GPU machines have
it. The counter covers the whole board but not the host's processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calm_serve.errors import ComponentError


class NvmlMeter:
    """Sum of the counters of `gpus`, times `share`.

    Args:
        nvml: the module `pynvml`.
        gpus: indices or UUIDs, as in CUDA_VISIBLE_DEVICES.
        share: this process's part of the GPUs in (0, 1]. A counter does not attribute joules to
            processes, so replicas that share a GPU split it by their declared parts.

    Raises ComponentError when there is no driver, no such GPU or no counter (old GPUs, MIG).
    """

    source = "counter"

    def __init__(self, nvml: Any, gpus: Sequence[str], share: float = 1.0) -> None:
        self._nvml, self._share = nvml, share
        try:
            nvml.nvmlInit()
            self._handles = [_handle(nvml, gpu) for gpu in gpus]
            self._last_mj = self._read()
        except (nvml.NVMLError, ValueError) as error:
            raise ComponentError(f"no energy counter on GPUs {list(gpus)}: {error}") from error
        self._joules = 0.0

    def read_j(self) -> float:
        """Return the joules since the meter was made; a GPU that fails adds nothing."""
        try:
            now_mj = self._read()
        except self._nvml.NVMLError:
            return self._joules  # skipped: a GPU that fails stops the engine anyway
        # The counter starts anew with the driver.
        spent_mj = sum(max(now - last, 0) for now, last in zip(now_mj, self._last_mj, strict=True))
        self._last_mj = now_mj
        self._joules += spent_mj * 1e-3 * self._share
        return self._joules

    def _read(self) -> list[int]:
        return [int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(h)) for h in self._handles]


def visible_gpus(visible: str | None, count: float) -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES; without it the first `count`, at least one."""
    if visible is None:
        return [str(i) for i in range(max(int(count), 1))]
    return [gpu for part in visible.split(",") if (gpu := part.strip())]


def _handle(nvml: Any, gpu: str) -> Any:
    if gpu.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(gpu))
    return nvml.nvmlDeviceGetHandleByUUID(gpu)
