"""The served changes of the `paper` experiment: how a running fleet adapts.

One fleet is served with its shipped predictor. It gets goals, then another mix of tasks, then twice
the load. Then the checkpoint of one SLM is replaced by another task's, which answers in the right
form but wrongly, with feedback on every answer; then of a second SLM, with feedback on three in
ten. A second fleet starts without one SLM, which its predictor does not know, and the SLM joins.
Then feedback is swapped, good for bad, until the service has trained on it and another predictor
decides. Then feedback is true again, until the service itself has rolled that predictor back.

Everything goes through the interfaces of operators and clients: HTTP, Serve's configuration and
`calm`. Feedback is the grade of the answer to a held-out row.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calm_serve.prediction import load_artifact
from load_tests.common.served import Service, fleet_file, serving
from load_tests.common.workloads import Request
from load_tests.paper.changes import figures as figures_of
from load_tests.paper.changes import plots
from load_tests.paper.changes.parts import (
    SEED,
    Changes,
    Sizes,
    capacity,
    goal_figures,
    goals,
    learning,
    sending,
)
from load_tests.paper.live import add_outcomes
from load_tests.paper.simulated.cold_start import without
from load_tests.paper.traffic import drawn

LOAD_RATIO = 0.45  # of the generalist's capacity; doubled where the load doubles
# The SLM, the SLM whose checkpoint it gets, and the share of answers with feedback. Both
# checkpoints answer with JSON, so a validator cannot tell them apart.
BROKEN = (("intent", "extract", 1.0), ("extract", "intent", 0.3))
JOINING_SLM, JOINING_FEEDBACK_RATIO = "sql", 0.3
FEEDBACK_RATIO = 0.3


def run(workload: Sequence[Request], folder: Path, sizes: Sizes | None = None) -> Changes:
    """Serve both fleets, print the table and draw the picture into `folder`."""
    sizes, changes, started = sizes or Sizes(), Changes(), time.monotonic()
    with TemporaryDirectory(prefix="calm") as name:
        _changing(changes, workload, Path(name), sizes)
    with TemporaryDirectory(prefix="calm") as name:
        _growing(changes, workload, Path(name), sizes)
    _summarise(changes)
    changes.config = {
        "sizes": asdict(sizes),
        "offered_ratio": LOAD_RATIO,
        "broken": BROKEN,
        "joining_slm": JOINING_SLM,
        "reported_by_the_service": changes.reported,
    }
    changes.figures["live.changes_errors"] = sum(bool(r.error) for r in changes.records)
    changes.figures["live.changes_minutes"] = round((time.monotonic() - started) / 60.0, 1)
    figures_of.show(changes.figures)
    plots.draw(folder, changes.parts, changes.limits, BROKEN, JOINING_SLM)
    return changes


def _changing(changes: Changes, workload: Sequence[Request], folder: Path, sizes: Sizes) -> None:
    """Goals and broken SLMs, on the whole fleet."""
    fleet = _without_rules(fleet_file("reference"), JOINING_SLM)
    folders: dict[str, Path] = {}
    for slm_id, _, _ in BROKEN:
        spec = _spec(fleet, slm_id)
        folders[slm_id] = folder / slm_id
        shutil.copytree(spec["model"], folders[slm_id])
        spec["model"] = str(folders[slm_id])
        spec.pop("adapters", None)
    with serving(fleet, _without_training, folder / "state") as service:
        asyncio.run(_change(changes, workload, service, folders, sizes, folder / "state"))


async def _change(
    changes: Changes,
    workload: Sequence[Request],
    service: Service,
    folders: Mapping[str, Path],
    sizes: Sizes,
    state: Path,
) -> None:
    async with sending(service, workload) as (operator, traffic):
        rate = LOAD_RATIO * await capacity(traffic)
        changes.figures["live.changes_requests_per_s"] = rate
        await goals(changes, operator, traffic, rate, sizes, state)
        places = drawn(workload, (), sizes.settled, SEED)
        settled = await traffic.send("settled", places, rate, feedback_ratio=FEEDBACK_RATIO)
        changes.parts["settled"] = settled
        for count, (slm_id, other, ratio) in zip(sizes.broken, BROKEN, strict=True):
            checkpoint = Path(_spec(fleet_file("reference"), other)["model"])
            await asyncio.to_thread(operator.exchange, slm_id, folders[slm_id], checkpoint)
            places = drawn(workload, (), count, SEED + 1)
            name = f"broken {slm_id}"
            changes.parts[name] = await traffic.send(name, places, rate, feedback_ratio=ratio)
            changes.reported[name] = {
                "alarms": operator.alarms(slm_id),
                "calibration_factor": operator.slm(slm_id)["calibration_factor"],
            }
            print(name, changes.reported[name], flush=True)
            found = figures_of.drain(settled, changes.parts[name], slm_id)
            alarms = [a["kind"] for a in changes.reported[name]["alarms"]]
            changes.figures |= {f"live.broken.{slm_id}.{k}": v for k, v in found.items()}
            changes.figures[f"live.broken.{slm_id}.alarms"] = ", ".join(alarms)
        await asyncio.sleep(2.0)  # for the router's last batch of outcomes
        add_outcomes(traffic.records, state)
        goal_figures(changes)


def _growing(changes: Changes, workload: Sequence[Request], folder: Path, sizes: Sizes) -> None:
    """An SLM joins that the predictor does not know and no rule names; then wrong feedback."""
    fleet = _without_rules(fleet_file("reference"), JOINING_SLM)
    spec = _spec(fleet, JOINING_SLM)
    fleet["slms"] = [s for s in fleet["slms"] if s["id"] != JOINING_SLM]
    artifact = without(load_artifact(Path(fleet["predictor"]) / "predictor.bin"), JOINING_SLM)
    (folder / "predictor").mkdir()
    (folder / "predictor" / "predictor.bin").write_bytes(artifact.to_bytes())
    fleet["predictor"] = str(folder / "predictor")
    labels = JOINING_FEEDBACK_RATIO * (sizes.before + sizes.settled)

    def change(args: dict[str, Any]) -> None:
        args["learning"]["min_outcomes"] = round(labels) + sizes.learned_from
        args["learning"]["retrain_every"] = sizes.learned_from

    with serving(fleet, change, folder / "state") as service:
        asyncio.run(_grow(changes, workload, service, spec, sizes))


async def _grow(
    changes: Changes,
    workload: Sequence[Request],
    service: Service,
    spec: dict[str, Any],
    sizes: Sizes,
) -> None:
    async with sending(service, workload) as (operator, traffic):
        rate = changes.figures.get("live.changes_requests_per_s") or 5.0
        places = drawn(workload, (), sizes.before, SEED + 5)
        await traffic.send("without it", places, rate, feedback_ratio=JOINING_FEEDBACK_RATIO)
        ready_s = await asyncio.to_thread(operator.join, spec)
        changes.reported["arrived"] = operator.predictor()
        places = drawn(workload, (), sizes.settled, SEED)  # as `settled` had them
        after = await traffic.send("arrival", places, rate, feedback_ratio=JOINING_FEEDBACK_RATIO)
        changes.parts["arrival"] = after
        changes.figures |= {
            "live.new.ready_s": ready_s,
            "live.new.predictor_then": changes.reported["arrived"]["version"],
            "live.new.predictor_at_end": operator.predictor()["version"],
        }
        if "settled" in changes.parts:
            found = figures_of.adoption(changes.parts["settled"], after, JOINING_SLM)
            changes.figures |= {f"live.new.{k}": v for k, v in found.items()}
        await learning(changes, operator, traffic, rate, sizes)


def _summarise(changes: Changes) -> None:
    """Add the figures that have targets: the worst case of each."""
    named = {
        "live.goal_recovery_requests": ("live.shift.", ".recovery_requests"),
        "live.broken_slm_drain_requests": ("live.broken.", ".drain_requests"),
        "live.new_slm_adoption_requests": ("live.new.", "adoption_requests"),
    }
    for name, (start, end) in named.items():
        found = [v for k, v in changes.figures.items() if k.startswith(start) and k.endswith(end)]
        if found:
            changes.figures[name] = max(found)


def _spec(fleet: Mapping[str, Any], slm_id: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in fleet["slms"] if s["id"] == slm_id)
    return found


def _without_rules(fleet: dict[str, Any], slm_id: str) -> dict[str, Any]:
    """The fleet without rules that name the SLM.

    Rules cannot name an SLM that has yet to join, and both fleets have to be comparable.
    """
    return {**fleet, "rules": [r for r in fleet["rules"] if slm_id not in r["slms"]]}


def _without_training(args: dict[str, Any]) -> None:
    args["learning"]["min_outcomes"] = 10**6
