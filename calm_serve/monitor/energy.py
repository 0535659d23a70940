"""Joules of this process and of each request in it.

Meters, best first; `source` travels with every number, because they are not of one kind:

- "counter": a per-device hardware counter (read where the device is, not here);
- "rapl": the processor package's counter, times this process's share of the busy CPU time;
- "estimate": CPU seconds times a stated power per busy core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# About the rated power of current server CPUs over their cores (200 to 350 W, 32 to 64 cores). It
# ranks SLMs on one machine; it is no measurement, and memory, fans and power supply are not in it.
DEFAULT_WATTS_PER_CORE = 6.0

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter(Protocol):
    """Cumulative joules."""

    @property
    def source(self) -> str:
        """Return "counter", "rapl" or "estimate"."""

    def read_j(self) -> float:
        """Return the joules since the meter was made; never less than the last time."""


class CpuTimeMeter:
    """Estimate: `read_cpu_s()` (cumulative busy CPU seconds) times `watts_per_core`."""

    source = "estimate"

    def __init__(
        self, read_cpu_s: Callable[[], float], watts_per_core: float = DEFAULT_WATTS_PER_CORE
    ) -> None:
        self._cpu_s = _Increments(read_cpu_s)
        self._watts_per_core = watts_per_core
        self._joules = 0.0

    def read_j(self) -> float:
        """Return the joules since the meter was made."""
        self._joules += self._cpu_s.next() * self._watts_per_core
        return self._joules


class CpuShare:
    """This process's part of the host's busy CPU time, in [0, 1], since the last call."""

    def __init__(
        self, read_cpu_s: Callable[[], float], read_host_cpu_s: Callable[[], float]
    ) -> None:
        self._own = _Increments(read_cpu_s)
        self._host = _Increments(read_host_cpu_s)

    def __call__(self) -> float:
        """Return the share; 0 when the host was idle."""
        own_s, host_s = self._own.next(), self._host.next()
        # The two clocks tick apart (10 ms each), so a short interval can show more than all of it.
        return min(own_s / host_s, 1.0) if host_s > 0.0 else 0.0


class RaplMeter:
    """Package counters of Linux powercap, times `share()`.

    A package counts everything on it, several SLMs included: without the share each of them would
    claim the whole machine. The package's idle power is thereby shared by whoever was busy.

    Args:
        paths: powercap folders of the packages (`energy_uj`, `max_energy_range_uj`).
        read: reads one such file.
        share: this process's part since the last call, in [0, 1]; see `CpuShare`.

    Raises OSError or ValueError when a counter cannot be read.
    """

    source = "rapl"

    def __init__(
        self, paths: Sequence[Path], read: Callable[[Path], str], share: Callable[[], float]
    ) -> None:
        self._read = read
        self._share = share
        self._counters = [p / "energy_uj" for p in paths]
        self._ranges_uj = [int(read(p / "max_energy_range_uj")) for p in paths]
        self._last_uj = [int(read(p)) for p in self._counters]
        self._joules = 0.0

    def read_j(self) -> float:
        """Return the joules since the meter was made; OSError when a counter went away."""
        now_uj = [int(self._read(p)) for p in self._counters]
        spent_uj = 0
        for now, last, limit in zip(now_uj, self._last_uj, self._ranges_uj, strict=True):
            spent_uj += now - last if now >= last else now - last + limit  # it wraps
        self._last_uj = now_uj
        self._joules += spent_uj * 1e-6 * self._share()
        return self._joules


def best_meter(
    read_cpu_s: Callable[[], float],
    read_host_cpu_s: Callable[[], float],
    *,
    watts_per_core: float = DEFAULT_WATTS_PER_CORE,
    powercap: Path = POWERCAP,
) -> EnergyMeter:
    """Return a RAPL meter where the counters are readable (often root only), else the estimate.

    Args:
        read_cpu_s: cumulative busy CPU seconds of this process and its children.
        read_host_cpu_s: the same of the whole host.
        watts_per_core: for the estimate.
        powercap: folder of the kernel's powercap zones.
    """
    packages = sorted(p for p in powercap.glob("intel-rapl:*") if p.name.count(":") == 1)
    if packages:
        try:
            return RaplMeter(packages, _read_text, CpuShare(read_cpu_s, read_host_cpu_s))
        except (OSError, ValueError):
            pass  # present but not readable: containers and unprivileged users, so estimate
    return CpuTimeMeter(read_cpu_s, watts_per_core)


@dataclass(frozen=True, slots=True)
class RequestEnergy:
    """What one request was charged."""

    energy_j: float
    tokens: int
    source: str


@dataclass(slots=True)
class _Share:
    energy_j: float = 0.0
    tokens: int = 0
    new_tokens: int = 0  # since the last tick


class TokenShareAttributor:
    """Splits a meter's joules over the requests that run, by the tokens each produced.

    At any time, the energy of all requests (finished and running) plus `idle_j` is `total_j`. Tick
    it once a second; it ticks itself when a request finishes. Used by one event loop; its size is
    the number of running requests, and whoever starts a request must finish it.
    """

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter = meter
        self._first_j = self._last_j = meter.read_j()
        self._running: dict[str, _Share] = {}
        self.idle_j = 0.0

    @property
    def total_j(self) -> float:
        """Joules from construction to the last tick."""
        return self._last_j - self._first_j

    @property
    def running_j(self) -> float:
        """Joules charged so far to requests that still run."""
        return sum(share.energy_j for share in self._running.values())

    def start(self, request_id: str) -> None:
        """Begin charging `request_id`; ValueError if it runs already."""
        if request_id in self._running:
            raise ValueError(f"request {request_id!r} runs already")
        if not self._running:
            self.tick()  # what was spent up to here was idle and not this request's
        self._running[request_id] = _Share()

    def add_tokens(self, request_id: str, tokens: int) -> None:
        """Count tokens that `request_id` produced; KeyError if it does not run."""
        share = self._running[request_id]
        share.tokens += tokens
        share.new_tokens += tokens

    def finish(self, request_id: str) -> RequestEnergy:
        """Stop charging `request_id` and return its account; KeyError if it does not run."""
        self.tick()
        share = self._running.pop(request_id)
        return RequestEnergy(share.energy_j, share.tokens, self._meter.source)

    def tick(self) -> None:
        """Charge what was spent since the last tick."""
        total_j = self._meter.read_j()
        spent_j, self._last_j = total_j - self._last_j, total_j
        shares = self._running.values()
        if not shares:
            self.idle_j += spent_j
            return
        new_tokens = sum(share.new_tokens for share in shares)
        for share in shares:
            # No token yet from anybody means that all of them are in prefill: equal parts.
            part = share.new_tokens / new_tokens if new_tokens else 1.0 / len(shares)
            share.energy_j += spent_j * part
            share.new_tokens = 0


class _Increments:
    """Turns a cumulative reading into non-negative steps.

    The CPU time of a process tree drops when a child dies; that is a step of 0, not a refund.
    """

    __slots__ = ("_last", "_read")

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._last = read()

    def next(self) -> float:
        value = self._read()
        step, self._last = max(value - self._last, 0.0), value
        return step


def _read_text(path: Path) -> str:
    return path.read_text(encoding="ascii")
