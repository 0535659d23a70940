"""Energy of one replica: the best meter available, its attribution to requests, and a check.

GPU and CPU joules are measured differently and never added: a replica with GPUs reports its GPUs'
counter, one without reports RAPL where that can be read, else an estimate from CPU time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from calm_serve.config import Resources
from calm_serve.errors import ComponentError
from calm_serve.protocol.reports import EnergyReport
from calm_serve.telemetry import (
    DEFAULT_WATTS_PER_CORE,
    POWERCAP,
    EnergyMeter,
    NvmlMeter,
    TokenShareAttributor,
    best_meter,
    visible_gpus,
)
from deployments.observability.host import ProcessTreeCpu, host_cpu_s

log = logging.getLogger("ray.serve")

REPORT_S = 10.0


class ProcessesCpu:
    """Cumulative CPU seconds of the processes that `processes` names at the time.

    A new process counts from its own start; the seconds of one that has ended stay in the total.
    """

    def __init__(self, processes: Callable[[], Sequence[psutil.Process]]) -> None:
        self._processes = processes
        self._last_s: dict[int, float] = {}
        self._total_s = 0.0

    def __call__(self) -> float:
        """Return the seconds, which never fall."""
        last_s, self._last_s = self._last_s, {}
        for process in self._processes():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds = float(times.user + times.system)
            self._total_s += max(seconds - last_s.get(process.pid, 0.0), 0.0)
            self._last_s[process.pid] = seconds
        return self._total_s


class ReplicaEnergy:
    """Meter and energy account of one replica.

    `account` attributes energy to requests; call `tick` once a second.

    Args:
        resources: what the replica may use.
        processes: returns its processes, itself included.
        clock: monotonic seconds.
        environ: has CUDA_VISIBLE_DEVICES.
        powercap: directory of the processors' RAPL counters.
    """

    def __init__(
        self,
        resources: Resources,
        processes: Callable[[], Sequence[psutil.Process]],
        clock: Callable[[], float] = time.monotonic,
        environ: Mapping[str, str] = os.environ,
        powercap: Path = POWERCAP,
    ) -> None:
        self._clock = clock
        meter = gpu_meter(resources.num_gpus, environ) or best_meter(
            ProcessesCpu(processes), host_cpu_s, powercap=powercap
        )
        self.account = TokenShareAttributor(meter)
        # Asks the kernel for all descendants, so it counts what `processes` misses.
        self._tree_cpu_s = ProcessTreeCpu(clock)
        self._first_cpu_s = self._tree_cpu_s()
        self._report_at = clock() + REPORT_S

    def tick(self) -> EnergyReport | None:
        """Attribute the energy since the last tick; every REPORT_S return a report, else None."""
        self.account.tick()
        now = self._clock()
        if now < self._report_at:
            return None
        self._report_at = now + REPORT_S
        return self.report()

    def report(self) -> EnergyReport:
        """Joules since the start: of requests, idle, total, and a check of the total.

        For an estimate the check is the CPU time of the whole process tree at the same power. For
        a counter there is no second source, so it is the counter itself.
        """
        account = self.account
        check_j = account.total_j
        if account.source == "estimate":
            check_j = (self._tree_cpu_s() - self._first_cpu_s) * DEFAULT_WATTS_PER_CORE
        return EnergyReport(
            requests_j=account.requests_j + account.running_j,
            idle_j=account.idle_j,
            total_j=account.total_j,
            check_j=check_j,
            source=account.source,
        )


def gpu_meter(num_gpus: float, environ: Mapping[str, str]) -> EnergyMeter | None:
    """The meter of the GPUs that this process may use; None, with the reason logged, if none."""
    if num_gpus <= 0.0:
        return None
    gpus = visible_gpus(environ.get("CUDA_VISIBLE_DEVICES"), num_gpus)
    try:
        import pynvml  # optional: extra `gpu`

        return NvmlMeter(pynvml, gpus, min(num_gpus / max(len(gpus), 1), 1.0))
    except (ImportError, ComponentError) as error:
        log.warning("GPU energy is not measured: %s", error)
        return None
