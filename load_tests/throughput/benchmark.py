"""Saturated tokens per second and goodput of two SLMs, against the same vLLM engines directly.

A bare pass-through in front of the same engines shows what a gateway in Python costs at least.

All sides run at once and are loaded in turn with the same requests, half for each SLM. Goodput is
the number of requests per second that meet the SLO in an open loop at a share of direct vLLM's
capacity; the bounds of the SLO are multiples of the time to first token and the time per token that
direct vLLM needs for one request alone. With `--peers`, other gateways in front of the same vLLM
servers take part.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from load_tests.common import arrivals, report
from load_tests.common.direct import (
    arguments,
    bare_fleet,
    direct,
    specs_of,
    started,
)
from load_tests.common.load import median
from load_tests.common.served import free_port, served
from load_tests.common.short_prompts import OUTPUT_TOKENS
from load_tests.peers import gateways
from load_tests.peers.gateways import Side
from load_tests.throughput import plots
from load_tests.throughput.runs import (
    BARE,
    CONCURRENCY,
    DIRECT,
    LOAD_RATIO,
    OPEN_S,
    OURS,
    REQUESTS,
    Bench,
    Calibration,
    Measured,
    calibrate,
)

SLMS = ("sql", "reason")
REPEATS = 5

Figures = dict[str, Any]


def ratios(values: Mapping[str, Sequence[float]], sides: Sequence[str]) -> Figures:
    """Ours over each other side within a repeat: median over the repeats, and the range."""
    found: Figures = {}
    for load in dict.fromkeys(name.partition("/")[0] for name in values):
        ours = values.get(f"{load}/{OURS}", ())
        for side in sides:
            other = values.get(f"{load}/{side}", ())
            pairs = [a / b for a, b in zip(ours, other, strict=False) if b > 0]
            if side == OURS or not pairs:
                continue
            kind, _, rest = load.partition("_")
            name = f"{kind}_ratio_{side}{'_' + rest if rest else ''}"
            found[name] = round(median(pairs), 4)
            found[f"{name}_range"] = [round(min(pairs), 4), round(max(pairs), 4)]
    return found


def figures_of(measured: Measured, sides: Sequence[str]) -> Figures:
    """Medians of every load and side, and ours over the others."""
    found = ratios(measured.values, sides)
    for name, values in measured.values.items():
        load, _, side = name.partition("/")
        unit = "tokens_per_s" if load.startswith("tokens") else "requests_per_s"
        found[f"{side}.{load}_{unit}"] = round(median(values), 2)
    for load, spent_ms in measured.router_cpu_ms.items():
        name = "router_cpu_ms_per_request" + load.removeprefix("tokens")
        found[name] = round(median(spent_ms), 2)
    return found


def show(measured: Measured, figures: Figures, sides: Sequence[str]) -> None:
    """Print the table of the sides."""
    loads = list(dict.fromkeys(name.partition("/")[0] for name in measured.values))
    rows = []
    for side in sides:
        cells = []
        for load in loads:
            values = measured.values.get(f"{load}/{side}")
            cells.append(f"{median(values):.1f}" if values else "-")
            kind, _, rest = load.partition("_")
            ratio = figures.get(f"{kind}_ratio_{side}{'_' + rest if rest else ''}")
            cells.append(f"{ratio:.3f}" if ratio is not None else "-")
        rows.append([side, *cells])
    names = {load: load.replace("tokens", "tok/s").replace("goodput", "req/s") for load in loads}
    head = [cell for load in loads for cell in (names[load].replace("_", " "), "ours / it")]
    print("\n" + report.table(["side", *head], rows))
    for name, value in figures.items():
        if name.startswith("router_cpu"):
            print(f"{name}: {value}")
    print(
        f"gaps of the trace's windows vary {measured.variation} (Poisson: 1); load generator at "
        f"most {measured.client_cpu_ratio:.2f} of a core, {1e3 * measured.late_s:.0f} ms late; "
        f"errors {dict(measured.errors) or 'none'}"
    )


class Throughput:
    """The rounds of one run of the benchmark, and their figures.

    Ours and `direct` take part in every round; peers run only in their own round.
    """

    def __init__(self, own: Sequence[Side], trace: Sequence[float], repeats: int) -> None:
        self.figures: Figures = {}
        self.values: dict[str, list[float]] = {}
        self.sides: list[str] = []
        self.errors: Counter[str] = Counter()
        self.variation: list[float] = []
        self._own = list(own)
        self._trace = trace
        self._repeats = repeats
        self.calibration = asyncio.run(calibrate(self._own[0]))
        _print_calibration(self.calibration)

    def round(self, others: Sequence[Side]) -> None:
        """Measure one round. Figures of ours and `direct` are those of the first round."""
        sides = [*self._own, *others]
        bench = Bench(sides, self._trace, self._repeats, self.calibration)
        measured = asyncio.run(bench.run())
        names = [side.name for side in sides]
        figures = figures_of(measured, names)
        show(measured, figures, names)
        self.figures = {**figures, **self.figures}
        self.values = {**measured.values, **self.values}
        self.sides += [name for name in names if name not in self.sides]
        self.errors += measured.errors
        self.variation = self.variation or measured.variation
        busiest = max(self.figures.get("client_cpu_ratio", 0.0), measured.client_cpu_ratio)
        self.figures["client_cpu_ratio"] = round(busiest, 3)
        self.figures["errors"] = self.errors.total()


def main(arguments_: Sequence[str]) -> int:
    """Command line of the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests throughput", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    names = ", ".join(name for group in gateways.GROUPS for name in group)
    parser.add_argument("--peers", action="store_true", help=f"also {names} (longer)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    chosen = parser.parse_args(arguments_)
    fleet = bare_fleet(SLMS)
    specs = specs_of(fleet)
    for spec in specs:
        print(f"{spec.id}: {' '.join(arguments(spec)[2:])}")
    folder = os.environ.get("DATA_DIR")
    trace = arrivals.read_trace(Path(folder)) if folder else []
    if not trace:
        print("without the Azure trace: DATA_DIR is not set")
    failed: dict[str, str] = {}
    with direct(specs) as urls, served(fleet) as ours, _bare_proxy(urls) as bare:
        own = [
            Side(DIRECT, {slm: (urls[slm], slm) for slm in SLMS}),
            Side(OURS, {slm: (ours, slm) for slm in SLMS}),
            Side(BARE, {slm: (bare[slm], slm) for slm in SLMS}),
        ]
        run = Throughput(own, trace, chosen.repeats)
        for group in gateways.GROUPS if chosen.peers else ((),):
            with ExitStack() as stack:
                peers, errors = gateways.start(stack, group, specs, urls)
                failed |= errors
                if peers or not run.figures:
                    run.round(peers)
    for name, error in failed.items():
        print(f"\n{name} did not run: {error}")
    plots.draw(report.PLOTS, run.values, run.sides)
    config = {
        "engines": {spec.id: arguments(spec) for spec in specs},
        "output_tokens": OUTPUT_TOKENS,
        "concurrency": CONCURRENCY,
        "requests": REQUESTS,
        "repeats": chosen.repeats,
        "offered_ratio": LOAD_RATIO,
        "open_loop_s": OPEN_S,
        "trace_variation": run.variation,
        "errors": dict(run.errors),
        "peers": gateways.VERSIONS if chosen.peers else {},
        "did_not_run": failed,
        **_offered(run.calibration),
    }
    report.write(chosen.json, "throughput", config, run.figures)
    return 0


@contextmanager
def _bare_proxy(urls: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Run the bare pass-through in front of the same servers; yields SLM to URL."""
    ports = {slm: free_port() for slm in urls}
    pairs = [f"{ports[slm]}={url}" for slm, url in urls.items()]
    command = [sys.executable, "-m", "load_tests.throughput.bare_proxy", *pairs]
    found = {slm: f"http://127.0.0.1:{port}" for slm, port in ports.items()}
    with started("bare proxy", command, found[SLMS[0]], os.environ) as server:
        server.wait(ready_s=30.0)
        yield found


def _offered(calibration: Calibration) -> Figures:
    return {
        "offered_requests_per_s": round(calibration.rate_per_s, 2),
        "slo_ms": {
            slm: {"ttft": round(1e3 * slo.ttft_s, 1), "tpot": round(1e3 * slo.tpot_s, 2)}
            for slm, slo in calibration.slos.items()
        },
    }


def _print_calibration(calibration: Calibration) -> None:
    for slm, slo in calibration.slos.items():
        print(f"SLO {slm}: TTFT <= {1e3 * slo.ttft_s:.0f} ms, TPOT <= {1e3 * slo.tpot_s:.1f} ms")
    print(
        f"{CONCURRENCY} at once: {REQUESTS} requests of {OUTPUT_TOKENS} tokens; open loops: "
        f"{calibration.rate_per_s:.1f} requests/s for {OPEN_S:.0f} s",
        flush=True,
    )
