"""The loads of the `throughput` benchmark, and their measures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import psutil
from tqdm import tqdm

from load_tests.common import arrivals
from load_tests.common.load import (
    Request,
    Run,
    closed_loop,
    median,
    open_loop,
)
from load_tests.common.short_prompts import (
    DEFAULT_TEXTS,
    LONG_QUESTIONS,
    ShortPrompts,
    texts,
)
from load_tests.common.sse import Answer
from load_tests.peers.gateways import Side

CONCURRENCY = 16
MANY = 64  # at once, of one SLM
REQUESTS = 48  # of one saturated run
ALONE_REQUESTS = 12  # per SLM, one at a time, for the SLO
LOAD_RATIO = 0.7  # rate of the open loops, over the saturated rate of `direct`
OPEN_S = 6.0  # length of an open loop
TTFT_SLO_RATIO, TPOT_SLO_RATIO = 10.0, 5.0  # of one request alone
SEED = 17
ROUTER_PROCESSES = ("ServeReplica:calm:router", "haproxy")
OURS, DIRECT, BARE = "calm_serve", "direct_vllm", "bare_proxy"


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Bounds of one SLM's answers in seconds."""

    ttft_s: float
    tpot_s: float

    def met(self, answer: Answer) -> bool:
        """True for a complete answer within the bounds."""
        return not answer.error and answer.ttft_s <= self.ttft_s and answer.tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Calibration:
    """From `direct` on this machine: the SLO of every SLM, and the rate of the open loops."""

    slos: Mapping[str, ServiceLevel]
    rate_per_s: float


@dataclass(slots=True)
class Measured:
    """Values by `load/side`, one per repeat, with errors and figures of the load generator."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)
    client_cpu_ratio: float = 0.0
    late_s: float = 0.0
    variation: list[float] = field(default_factory=list)  # of the trace's windows
    router_cpu_ms: dict[str, list[float]] = field(  # per request, by load
        default_factory=lambda: defaultdict(list)
    )


def router_cpu_s() -> float:
    """CPU seconds so far of all routers and HAProxy processes below this process."""
    total_s = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if any(name in title for name in ROUTER_PROCESSES):
                times = process.cpu_times()
                total_s += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total_s


def goodput(
    run: Run, requests: Sequence[Request], slos: Mapping[str, ServiceLevel], length_s: float
) -> float:
    """Requests that met their SLM's SLO, per second of the open loop."""
    pairs = zip(requests, run.answers, strict=True)
    return sum(slos[request.slm].met(answer) for request, answer in pairs) / length_s


def slo_of(answers: Sequence[Answer]) -> ServiceLevel:
    """The SLO, from answers to requests that ran alone."""
    return ServiceLevel(
        TTFT_SLO_RATIO * median([a.ttft_s for a in answers]),
        TPOT_SLO_RATIO * median([a.tpot_s for a in answers]),
    )


def requests_to(
    side: Side, prompts: ShortPrompts, slms: Sequence[str], count: int
) -> list[Request]:
    """The next requests to a side, for the SLMs in turn."""
    chosen = (slms[i % len(slms)] for i in range(count))
    return [prompts.request(*side.targets[slm], slm=slm, key=side.key) for slm in chosen]


async def calibrate(direct: Side) -> Calibration:
    """Measure `direct` alone, after a warm-up."""
    prompts, slms = ShortPrompts(), list(direct.targets)
    await closed_loop(requests_to(direct, prompts, slms, 2 * CONCURRENCY), CONCURRENCY)
    slos = {}
    for slm in slms:
        alone = await closed_loop(requests_to(direct, prompts, [slm], ALONE_REQUESTS), 1)
        slos[slm] = slo_of(alone.good)
    full = await closed_loop(requests_to(direct, prompts, slms, REQUESTS), CONCURRENCY)
    return Calibration(slos, LOAD_RATIO * len(full.good) / full.elapsed_s)


class Bench:
    """Runs every load on every side in turn. With an empty `trace` its load is left out."""

    def __init__(
        self, sides: Sequence[Side], trace: Sequence[float], repeats: int, calibration: Calibration
    ) -> None:
        self.measured = Measured()
        self._sides = list(sides)
        self._slms = list(self._sides[0].targets)
        self._trace = trace
        self._repeats = repeats
        self._calibration = calibration
        self._prompts = ShortPrompts()
        self._long_prompts = ShortPrompts(texts(DEFAULT_TEXTS, questions=LONG_QUESTIONS))

    async def run(self) -> Measured:
        """Warm up every side, then measure, each repeat starting with another side."""
        for side in self._sides:
            await closed_loop(self._requests(side, self._slms, 2 * CONCURRENCY), CONCURRENCY)
        loads: list[Callable[[Side, int], Awaitable[None]]] = [
            self._saturated,
            self._many,
            self._long,
            self._poisson,
            self._azure,
        ]
        total = self._repeats * len(loads) * len(self._sides)
        with tqdm(total=total, desc="throughput", mininterval=1.0) as bar:
            for repeat in range(self._repeats):
                for load in loads:
                    for i in range(len(self._sides)):
                        await load(self._sides[(i + repeat) % len(self._sides)], repeat)
                        bar.update()
        return self.measured

    def _requests(self, side: Side, slms: Sequence[str], count: int) -> list[Request]:
        return requests_to(side, self._prompts, slms, count)

    async def _saturated(self, side: Side, repeat: int) -> None:
        del repeat
        mixes: dict[str, tuple[str, ...]] = {"tokens": tuple(self._slms)}
        if side.name in (OURS, DIRECT, BARE):
            mixes |= {f"tokens_{slm}": (slm,) for slm in self._slms}
        for name, slms in mixes.items():
            await self._closed(side, name, self._requests(side, slms, REQUESTS), CONCURRENCY)

    async def _many(self, side: Side, repeat: int) -> None:
        del repeat
        if side.name in (OURS, DIRECT, BARE):
            requests = self._requests(side, self._slms[:1], 2 * MANY)
            await self._closed(side, f"tokens_{MANY}_at_once", requests, MANY)

    async def _long(self, side: Side, repeat: int) -> None:
        del repeat
        if side.name in (OURS, DIRECT, BARE):
            requests = requests_to(side, self._long_prompts, self._slms[:1], REQUESTS)
            await self._closed(side, "tokens_long_prompts", requests, CONCURRENCY)

    async def _closed(
        self, side: Side, name: str, requests: Sequence[Request], at_once: int
    ) -> None:
        before_s = router_cpu_s()
        run = await closed_loop(requests, at_once)
        self._add_run(side, run)
        self.measured.values[f"{name}/{side.name}"].append(run.tokens_per_s)
        if side.name == OURS and run.good:
            spent_ms = 1e3 * (router_cpu_s() - before_s)
            self.measured.router_cpu_ms[name].append(spent_ms / len(run.good))

    async def _poisson(self, side: Side, repeat: int) -> None:
        rate = self._calibration.rate_per_s
        at_s = arrivals.poisson(rate, self._count(), Random(f"{SEED} {repeat}"))
        await self._open(side, "goodput_poisson", at_s)

    async def _azure(self, side: Side, repeat: int) -> None:
        if not self._trace:
            return
        count = self._count()
        start = repeat * (len(self._trace) - count) // self._repeats
        at_s = arrivals.scaled(self._trace, start, count, self._calibration.rate_per_s)
        if side.name == DIRECT:
            self.measured.variation.append(round(arrivals.variation(at_s), 2))
        await self._open(side, "goodput_azure", at_s)

    def _count(self) -> int:
        return max(8, round(self._calibration.rate_per_s * OPEN_S))

    async def _open(self, side: Side, name: str, at_s: Sequence[float]) -> None:
        requests = self._requests(side, self._slms, len(at_s))
        run = await open_loop(requests, at_s)
        self._add_run(side, run)
        good = goodput(run, requests, self._calibration.slos, at_s[-1])
        self.measured.values[f"{name}/{side.name}"].append(good)

    def _add_run(self, side: Side, run: Run) -> None:
        self.measured.errors.update(f"{side.name}: {a.error}" for a in run.answers if a.error)
        self.measured.client_cpu_ratio = max(self.measured.client_cpu_ratio, run.client_cpu_ratio)
        self.measured.late_s = max(self.measured.late_s, run.late_s)
