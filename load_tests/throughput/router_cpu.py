"""CPU time of the processes between the client and the engine: routers and HAProxy."""

from __future__ import annotations

import psutil

NAMES = ("ServeReplica:calm:router", "haproxy")


def router_cpu_s() -> float:
    """CPU seconds so far of all routers and HAProxy processes below this process."""
    total_s = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if any(name in title for name in NAMES):
                times = process.cpu_times()
                total_s += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total_s
