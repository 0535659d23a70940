"""The served changes of the `paper` experiment: does the loop close on a running fleet?

One fleet is served with the predictor it comes with. It is given goals, and then another mix of
tasks and twice the load. Then the checkpoint of one SLM is exchanged for another task's, which
answers in the right form and wrongly; all answers are judged, then, for a second SLM, three in ten.
A second fleet starts without one SLM, which its predictor has never seen, and the SLM joins. Then
feedback is swapped, good for bad, until the service has learned that and another predictor decides;
and is the truth again, until the service has gone back by itself.

Everything goes through what an operator and users have: HTTP, Serve's configuration and `calm`.
Feedback is the grade of the answer on held-out rows.
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
from load_tests.paper.changes import figures as judged
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

LOAD_RATIO = 0.45  # of what the generalist alone can do; doubled where the load doubles
# The SLM, whose checkpoint it gets, and how many of the answers are judged. Both checkpoints answer
# with JSON, so the form says nothing.
BROKEN = (("intent", "extract", 1.0), ("extract", "intent", 0.3))
NEWCOMER, NEWCOMER_FEEDBACK = "sql", 0.3
OLD_FEEDBACK = 0.3


def run(asked: Sequence[Request], folder: Path, sizes: Sizes | None = None) -> Changes:
    """Serve both fleets; prints the table and writes the picture."""
    sizes, changes, started = sizes or Sizes(), Changes(), time.monotonic()
    with TemporaryDirectory(prefix="calm") as name:
        _changing(changes, asked, Path(name), sizes)
    with TemporaryDirectory(prefix="calm") as name:
        _growing(changes, asked, Path(name), sizes)
    _summarise(changes)
    changes.config = {
        "sizes": asdict(sizes),
        "offered_ratio": LOAD_RATIO,
        "broken": BROKEN,
        "newcomer": NEWCOMER,
        "said_by_the_service": changes.seen,
    }
    changes.figures["live.changes_errors"] = sum(bool(r.error) for r in changes.records)
    changes.figures["live.changes_minutes"] = round((time.monotonic() - started) / 60.0, 1)
    judged.show(changes.figures)
    plots.draw(folder, changes.parts, changes.limits, BROKEN, NEWCOMER)
    return changes


def _changing(changes: Changes, asked: Sequence[Request], folder: Path, sizes: Sizes) -> None:
    """Goals and broken SLMs, on the whole fleet."""
    fleet = _without_rules(fleet_file("reference"), NEWCOMER)
    own: dict[str, Path] = {}
    for slm_id, _, _ in BROKEN:
        spec = _spec(fleet, slm_id)
        own[slm_id] = folder / slm_id
        shutil.copytree(spec["model"], own[slm_id])
        spec["model"] = str(own[slm_id])
        spec.pop("adapters", None)
    with serving(fleet, _learn_nothing, folder / "state") as service:
        asyncio.run(_change(changes, asked, service, own, sizes, folder / "state"))


async def _change(
    changes: Changes,
    asked: Sequence[Request],
    service: Service,
    own: Mapping[str, Path],
    sizes: Sizes,
    state: Path,
) -> None:
    async with sending(service, asked) as (operator, traffic):
        rate = LOAD_RATIO * await capacity(traffic)
        changes.figures["live.changes_requests_per_s"] = rate
        await goals(changes, operator, traffic, rate, sizes, state)
        places = drawn(asked, (), sizes.settled, SEED)
        settled = await traffic.send("settled", places, rate, feedback_ratio=OLD_FEEDBACK)
        changes.parts["settled"] = settled
        for count, (slm_id, other, ratio) in zip(sizes.broken, BROKEN, strict=True):
            checkpoint = Path(_spec(fleet_file("reference"), other)["model"])
            await asyncio.to_thread(operator.exchange, slm_id, own[slm_id], checkpoint)
            places = drawn(asked, (), count, SEED + 1)
            name = f"broken {slm_id}"
            changes.parts[name] = await traffic.send(name, places, rate, feedback_ratio=ratio)
            changes.seen[name] = {
                "alarms": operator.alarms(slm_id),
                "calibration_factor": operator.slm(slm_id)["calibration_factor"],
            }
            print(name, changes.seen[name], flush=True)
            found = judged.drain(settled, changes.parts[name], slm_id)
            alarms = [a["kind"] for a in changes.seen[name]["alarms"]]
            changes.figures |= {f"live.broken.{slm_id}.{k}": v for k, v in found.items()}
            changes.figures[f"live.broken.{slm_id}.alarms"] = ", ".join(alarms)
        await asyncio.sleep(2.0)  # the router's last batch is under way
        add_outcomes(traffic.records, state)
        goal_figures(changes)


def _growing(changes: Changes, asked: Sequence[Request], folder: Path, sizes: Sizes) -> None:
    """An SLM joins that the predictor has never seen; no rule names it. Then wrong lessons."""
    fleet = _without_rules(fleet_file("reference"), NEWCOMER)
    spec = _spec(fleet, NEWCOMER)
    fleet["slms"] = [s for s in fleet["slms"] if s["id"] != NEWCOMER]
    artifact = without(load_artifact(Path(fleet["predictor"]) / "predictor.bin"), NEWCOMER)
    (folder / "predictor").mkdir()
    (folder / "predictor" / "predictor.bin").write_bytes(artifact.to_bytes())
    fleet["predictor"] = str(folder / "predictor")
    labels = NEWCOMER_FEEDBACK * (sizes.before + sizes.settled)

    def change(args: dict[str, Any]) -> None:
        args["learning"]["min_outcomes"] = round(labels) + sizes.learned_from
        args["learning"]["retrain_every"] = sizes.learned_from

    with serving(fleet, change, folder / "state") as service:
        asyncio.run(_grow(changes, asked, service, spec, sizes))


async def _grow(
    changes: Changes,
    asked: Sequence[Request],
    service: Service,
    spec: dict[str, Any],
    sizes: Sizes,
) -> None:
    async with sending(service, asked) as (operator, traffic):
        rate = changes.figures.get("live.changes_requests_per_s") or 5.0
        places = drawn(asked, (), sizes.before, SEED + 5)
        await traffic.send("without it", places, rate, feedback_ratio=NEWCOMER_FEEDBACK)
        ready_s = await asyncio.to_thread(operator.join, spec)
        changes.seen["arrived"] = operator.predictor()
        places = drawn(asked, (), sizes.settled, SEED)  # as `settled` had them
        after = await traffic.send("arrival", places, rate, feedback_ratio=NEWCOMER_FEEDBACK)
        changes.parts["arrival"] = after
        changes.figures |= {
            "live.new.ready_s": ready_s,
            "live.new.predictor_then": changes.seen["arrived"]["version"],
            "live.new.predictor_at_end": operator.predictor()["version"],
        }
        if "settled" in changes.parts:
            found = judged.adoption(changes.parts["settled"], after, NEWCOMER)
            changes.figures |= {f"live.new.{k}": v for k, v in found.items()}
        await learning(changes, operator, traffic, rate, sizes)


def _summarise(changes: Changes) -> None:
    """The figures that have a target: the worst case of each."""
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
    """Rules cannot name an SLM that joins, and what it gets is compared with the known one's."""
    return {**fleet, "rules": [r for r in fleet["rules"] if slm_id not in r["slms"]]}


def _learn_nothing(args: dict[str, Any]) -> None:
    args["learning"]["min_outcomes"] = 10**6
