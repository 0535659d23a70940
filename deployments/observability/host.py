"""Usage of this process and its machine, read through psutil.

GPUs are not read here: Ray's node agent exports their utilisation and memory already
(`ray_node_gpus_utilization`, `ray_node_gram_used`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil

_REFRESH_CHILDREN_S = 10.0  # between two listings of the child processes


@dataclass(frozen=True, slots=True)
class HostUsage:
    """Usage of the machine at one moment."""

    cpu_ratio: float  # busy share of all cores since the previous reading
    memory_used_bytes: int
    memory_total_bytes: int


def host_cpu_s() -> float:
    """Return the CPU seconds all cores were busy since boot."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
    # The kernel counts guest time in user time too, so it is in the sum twice.
    return float(busy - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))


class HostMonitor:
    """Reads `HostUsage` in microseconds; never waits."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._cores = psutil.cpu_count() or 1
        self._last = (clock(), host_cpu_s())

    def read(self) -> HostUsage:
        """Return the usage since the previous read (or since construction)."""
        now = (self._clock(), host_cpu_s())
        elapsed_s = max(now[0] - self._last[0], 1e-9)
        ratio = (now[1] - self._last[1]) / elapsed_s / self._cores
        self._last = now
        memory = psutil.virtual_memory()
        return HostUsage(
            cpu_ratio=min(max(ratio, 0.0), 1.0),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
        )


class ProcessTreeCpu:
    """Cumulative CPU seconds of this process and its descendants (an engine runs in children).

    Listing children scans the process table, so the list is renewed every 10 seconds only.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._root = psutil.Process(os.getpid())
        self._tree: list[psutil.Process] = []
        self._listed_at = float("-inf")

    def __call__(self) -> float:
        """Return the seconds; a child that ended is in the times that its parent waited for."""
        now = self._clock()
        if now - self._listed_at >= _REFRESH_CHILDREN_S:
            self._tree = [self._root, *self._root.children(recursive=True)]
            self._listed_at = now
        total_s = 0.0
        for process in self._tree:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total_s += times.user + times.system
            total_s += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        return total_s
