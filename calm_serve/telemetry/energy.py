"""Energy: joules of this process and of each request in it.

Meters, best first; every number carries its `source`, because they are not comparable:

- "counter": the hardware counter of a device (see `nvml`);
- "rapl": the processor package's counter, times this process's share of the busy CPU time;
- "estimate": CPU seconds times a configured power per busy core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# About the rated power of current server CPUs per core (200 to 350 W, 32 to 64 cores). It ranks
# SLMs on one machine. It is no measurement, and memory, fans and power supply are not in it.
DEFAULT_WATTS_PER_CORE = 6.0

# Between two readings of a meter. CPU times have steps of 10 ms, so more frequent readings add
# little information.
MIN_READ_S = 0.05
POWER_MEMORY_S = 0.5  # busy seconds behind the recent power
PACE_GAIN = 0.1  # weight of the newest answer in the mean tokens per second of an answer

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
        # The clocks tick separately (every 10 ms), so a short interval can give more than 1.
        return min(own_s / host_s, 1.0) if host_s > 0.0 else 0.0


class RaplMeter:
    """Package counters of Linux powercap, times `share()`.

    A package's counter includes every process, and so several SLMs. Without the share, each SLM
    would be charged for the whole machine. The package's idle power is divided over busy processes
    in this way.

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
            pass  # not readable in containers and for unprivileged users: estimate
    return CpuTimeMeter(read_cpu_s, watts_per_core)


@dataclass(frozen=True, slots=True)
class RequestEnergy:
    """Energy charged to one request."""

    energy_j: float
    tokens: int
    source: str


@dataclass(slots=True)
class _Share:
    started: float
    updated_at: float  # when it last reported tokens
    energy_j: float = 0.0
    tokens: int = 0
    new_tokens: float = 0.0  # reported since the last reading
    made: float = 0.0  # tokens since the last reading, unreported ones estimated


class TokenShareAttributor:
    """Splits a meter's joules over the running requests, by the tokens that each produced.

    The accounts balance at any time: requests_j + running_j + idle_j == total_j + ahead_j. Call
    `tick` once a second. Used from one event loop; its size is the number of running requests, so
    every started request must be finished.

    A reading costs more than the accounting of a request, so at least `min_read_s` pass between two
    readings. A request that finishes in between is charged its tokens' part of the recent power of
    busy time. Those joules are ahead of the meter and are subtracted from the next reading. So the
    error of one request is at most |power now - recent power| * min_read_s; the requests (or the
    idle time) of the next interval carry it, so the sum of all joules stays right. `ahead_j` is at
    most the recent power times min_read_s.

    A reply that is not streamed reports its tokens at the end: they count as produced evenly while
    it ran. A request that has not reported yet is assumed to produce tokens at the mean pace.
    """

    def __init__(
        self,
        meter: EnergyMeter,
        clock: Callable[[], float] = time.monotonic,
        min_read_s: float = MIN_READ_S,
    ) -> None:
        self._meter, self._clock, self._min_read_s = meter, clock, min_read_s
        self._first_j = self._last_j = meter.read_j()
        self._read_at = self._busy_at = clock()
        self._busy_s = 0.0  # since the last reading, up to the last time that nothing ran
        self._power_w: float | None = None  # of busy time
        self._pace = 0.0  # tokens per second of one request, 0 before the first is known
        self._running: dict[str, _Share] = {}
        self.idle_j = self.requests_j = self.ahead_j = 0.0

    @property
    def source(self) -> str:
        """The meter's source."""
        return self._meter.source

    @property
    def total_j(self) -> float:
        """Joules from construction to the last reading."""
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
            self._tick_if_due()  # joules spent so far are idle, not this request's
            self._busy_at = self._clock()
        now = self._clock()
        self._running[request_id] = _Share(started=now, updated_at=now)

    def add_tokens(self, request_id: str, tokens: int) -> None:
        """Count tokens that `request_id` produced; KeyError if it does not run."""
        share, now = self._running[request_id], self._clock()
        unreported_s, unread_s = now - share.updated_at, now - self._read_at
        share.tokens += tokens
        share.new_tokens += tokens if unreported_s <= unread_s else tokens * unread_s / unreported_s
        share.updated_at = now

    def finish(self, request_id: str) -> RequestEnergy:
        """Stop charging `request_id` and return its account; KeyError if it does not run."""
        share, now = self._running[request_id], self._clock()
        self._measure_pace(share, now)
        if not self._tick_if_due() and self._power_w is not None:
            unread_j = self._power_w * (self._busy_s + now - self._busy_at)
            part = self._part(share, self._count_made(now))
            charged_j = max(unread_j - self.ahead_j, 0.0) * part
            share.energy_j += charged_j
            self.ahead_j += charged_j
        del self._running[request_id]
        if not self._running:
            self._busy_s += self._clock() - self._busy_at
        self.requests_j += share.energy_j
        return RequestEnergy(share.energy_j, share.tokens, self._meter.source)

    def tick(self) -> None:
        """Read the meter and charge what was spent since the last reading."""
        total_j, now = self._meter.read_j(), self._clock()
        spent_j, self._last_j = total_j - self._last_j, total_j
        made = self._count_made(now)
        self._measure_power(spent_j, now)
        charged_j = min(spent_j, self.ahead_j)
        self.ahead_j -= charged_j
        spent_j -= charged_j
        if not self._running:
            self.idle_j += spent_j
            return
        for share in self._running.values():
            share.energy_j += spent_j * self._part(share, made)
            share.new_tokens = 0.0

    def _tick_if_due(self) -> bool:
        known = self._power_w is not None
        if known and self._clock() - self._read_at < self._min_read_s:
            return False
        self.tick()
        return True

    def _measure_power(self, spent_j: float, now: float) -> None:
        """Update the power of busy time; idle joules in the interval are neglected."""
        busy_s, self._busy_s = self._busy_s, 0.0
        if self._running:
            busy_s, self._busy_at = busy_s + now - self._busy_at, now
        self._read_at = now
        if busy_s > 0.0:
            before_w = spent_j / busy_s if self._power_w is None else self._power_w
            gain = min(busy_s / POWER_MEMORY_S, 1.0)
            self._power_w = before_w + gain * (spent_j / busy_s - before_w)

    def _measure_pace(self, share: _Share, now: float) -> None:
        if share.tokens and now > share.started:
            pace = share.tokens / (now - share.started)
            self._pace += PACE_GAIN * (pace - self._pace) if self._pace else pace

    def _count_made(self, now: float) -> float:
        """Tokens of all requests since the last reading; unreported ones are estimated."""
        for share in self._running.values():
            unreported_s = now - max(share.updated_at, self._read_at)
            share.made = share.new_tokens + self._pace * unreported_s
        return sum(share.made for share in self._running.values())

    def _part(self, share: _Share, made: float) -> float:
        """The request's part of the joules since the last reading, in [0, 1]."""
        # Without any token all requests are in prefill: equal parts.
        return share.made / made if made else 1.0 / len(self._running)


class _Increments:
    """Turns a cumulative reading into non-negative steps.

    The CPU time of a process tree drops when a child dies; that counts as a step of 0.
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
