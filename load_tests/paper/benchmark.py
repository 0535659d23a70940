"""The CALM paper's experiment on the reference fleet: generalist alone, the paper's policy, ours.

Served: the standard workload is sent to the fleet. Policies take turns in blocks and are switched
at run time (`PUT /v1/goals`): the generalist alone; the paper's score (`routing/calm_paper.py`);
content-blind random with the shares of ours; ours; and ours with the generalist's or the paper's
quality as its target (`min_quality`), which compares cost at equal quality. Requests are batched
under all policies; a smaller part sends one request at a time, as in the paper. Arrivals: one
compressed day with the shape of the 1998 football world cup's web site (`arrivals.world_cup`), and
the Azure trace of code requests if DATA_DIR is set. Once with all models hot, once with memory for
half of them, where the paper's policy has the paper's cache (LRU).

Latency is measured by the client, from when a request was due; quality is graded on held-out
answers; energy is what the service attributed, on a CPU an estimate from CPU time. The service does
not learn meanwhile.

Served as well: changes of goals, SLMs and feedback (`changes/`). Simulated: further policies,
residency, and changes (`simulated/`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calm_serve.config import parse_fleet
from load_tests.common import arrivals, report
from load_tests.common.served import FLEETS, fleet_file
from load_tests.common.workloads import standard
from load_tests.paper import plots
from load_tests.paper.changes.benchmark import run as run_changes
from load_tests.paper.figures import (
    POLICIES,
    RESAMPLES,
    Figures,
    Record,
    Table,
    comparisons,
    per_policy,
    residency,
    show,
    show_comparisons,
)
from load_tests.paper.live import (
    FULL,
    LOAD_RATIO,
    Live,
    Sizes,
    half,
    hot,
)
from load_tests.paper.runs import MAX_TOKENS
from load_tests.paper.simulated import benchmark as simulation

# Scenario -> prefix of the figures of ours over others.
PREFIXES = {"hot": "", "azure": "azure_", "serial": "serial_", "half_memory": "half_memory_"}


def half_budget() -> int:
    """Declared bytes of the larger half of the fleet's SLMs."""
    declared = sorted(s.declared_bytes for s in parse_fleet(fleet_file("reference"), FLEETS).slms)
    return sum(declared[len(declared) // 2 :])


def figures_of(live: Live) -> tuple[Figures, dict[str, Table]]:
    """Figures of all scenarios, and a table per scenario."""
    found: Figures = {}
    tables: dict[str, Table] = {}
    for scenario, prefix in PREFIXES.items():
        records = [r for r in live.records if r.scenario == scenario]
        if not records:
            continue
        tables[scenario] = Table(records, POLICIES)
        found |= comparisons(tables[scenario], prefix)
        found |= per_policy(tables[scenario], scenario)
    if "half_memory" in tables:
        found |= residency(tables["half_memory"], len(fleet_file("reference")["slms"]) // 2)
    for name, cores in live.cores_busy.items():
        found[f"{name}.cores_busy"] = cores
    found["client_cpu_ratio"] = round(live.client_cpu_ratio, 3)
    found["errors"] = sum(bool(r.error) for r in live.records)
    return found, tables


def main(arguments: Sequence[str]) -> int:
    """Command line of the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests paper", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, default=report.PLOTS, help="folder of the pictures")
    parser.add_argument(
        "--records", type=Path, help="write every request to this file (JSON lines)"
    )
    parser.add_argument("--day", type=int, default=480, help="requests of a day: %(default)s")
    parser.add_argument("--trace", type=int, default=160, help="of the trace: %(default)s")
    parser.add_argument("--serial", type=int, default=60, help="one at a time: %(default)s")
    parser.add_argument("--half", type=int, default=240, help="at half memory: %(default)s")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--live", action="store_true", help="only the served parts")
    part.add_argument("--changes", action="store_true", help="only the served changes")
    part.add_argument("--simulated", action="store_true", help="only the simulated part")
    chosen = parser.parse_args(arguments)
    if chosen.simulated:
        simulated = simulation.run(simulation.Sizes(), chosen.plots)
        config = simulation.config_of(simulation.Sizes())
        report.write(chosen.json, "paper", {"simulated": config}, simulated)
        return 0
    if chosen.changes:
        changes = run_changes(standard(), chosen.plots)
        _write_records(chosen.records, changes.records)
        report.write(chosen.json, "paper", {"changes": changes.config}, changes.figures)
        return 0
    _run_all(chosen)
    return 0


def _run_all(chosen: argparse.Namespace) -> None:
    """The served parts, and the simulated one unless `--live` is given."""
    started = time.monotonic()
    workload, live = standard(), Live()
    folder = os.environ.get("DATA_DIR")
    trace = arrivals.read_trace(Path(folder)) if folder else []
    if not trace:
        print("without the Azure trace: DATA_DIR is not set")
    sizes = Sizes(chosen.day, chosen.trace, chosen.serial, chosen.half)
    hot(live, workload, trace, sizes, POLICIES)
    if sizes.half:
        half(live, workload, sizes, {"memory_budget_bytes": half_budget()})
    figures, tables = figures_of(live)
    energy = sorted({r.energy_source for r in live.records if r.energy_source})
    _show(live, figures, tables, energy)
    changes = run_changes(workload, chosen.plots)
    figures |= changes.figures
    figures["live_minutes"] = round((time.monotonic() - started) / 60.0, 1)
    plots.draw(chosen.plots, tables, figures, live.rate_per_s)
    _write_records(chosen.records, [*live.records, *changes.records])
    config = _config(live, sizes, energy) | {"changes": changes.config}
    if not chosen.live:
        simulated = simulation.run(simulation.Sizes(), chosen.plots)
        # Served figures take precedence, and must not get an interval of the simulation.
        figures |= {k: v for k, v in simulated.items() if k.removesuffix("_ci95") not in figures}
        config["simulated"] = simulation.config_of(simulation.Sizes())
    report.write(chosen.json, "paper", config, figures)


def _show(live: Live, figures: Figures, tables: dict[str, Table], energy: Sequence[str]) -> None:
    for scenario, table in tables.items():
        show(table, scenario, figures)
    show_comparisons(figures, list(PREFIXES.values()))
    for name, value in figures.items():
        if "residency_hit" in name:
            print(f"{name}: {value}")
    print(
        f"energy: {', '.join(energy)} of the SLMs' processes; load generator at most "
        f"{live.client_cpu_ratio:.2f} of a core, {1e3 * live.late_s:.0f} ms late; gaps of the "
        f"arrivals vary {live.variation} (Poisson: 1)"
    )


def _write_records(path: Path | None, records: Sequence[Record]) -> None:
    if path is not None:
        lines = [json.dumps(asdict(record)) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _config(live: Live, sizes: Sizes, energy: Sequence[str]) -> dict[str, Any]:
    return {
        "sizes": asdict(sizes),
        "workload": "load_tests.common.workloads.standard",
        "max_tokens": MAX_TOKENS,
        "generalist_capacity_per_s": round(live.capacity_per_s, 2),
        "generalist_in_flight": FULL,
        "offered_ratio": LOAD_RATIO,
        "offered_requests_per_s": round(live.rate_per_s, 2),
        "memory_budget_bytes": half_budget(),
        "gap_variation": live.variation,
        "late_s": round(live.late_s, 3),
        "energy_source": list(energy),
        "resamples": RESAMPLES,
        "fleet_at_the_end": live.fleet,
    }
