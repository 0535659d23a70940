"""Simulated changes of the `paper` experiment: workload, load, hardware, goals, broken SLMs.

Counts are of requests after the change. Each function runs one seed and returns figures by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from calm_serve.config import Goals
from load_tests.paper.simulated.answers import Answers, shipped
from load_tests.paper.simulated.call import Fault, Row
from load_tests.paper.simulated.scenarios import Figures, capacity_rps
from load_tests.paper.simulated.world import World

BEFORE, AFTER = 500, 900
WINDOW = 100  # requests over which a goal's metric is taken
GOAL_TOLERANCE = 1.1  # a goal holds up to 10 % above it
FEEDBACK_RATIO = 0.3  # share of answers with feedback, unless the figure's name has another

SHARE_RATIO = 0.8  # of its usual share, at which a repaired or joining SLM has its traffic
LOST_RATIO = 0.2  # of its usual share, at which a broken SLM has lost its traffic


@dataclass(frozen=True)
class Shift:
    """A change, and the goal that has to hold afterwards."""

    name: str
    goals: Goals
    metric: str  # "energy_j" (mean) or "latency_s" (95th percentile)
    limit: float
    new_goals: Goals | None = None
    load: float = 1.0
    slower: float = 1.0  # factor on the largest SLM's times
    tasks: tuple[tuple[str, ...], tuple[str, ...]] | None = None  # before, after


SHIFTS = ("mix", "load", "hardware", "goals")


def shifts_of(answers: Answers) -> list[Shift]:
    """The shifts; with the stated weights alone the goal would be missed (`shift.*.without`)."""
    # In units of the largest SLM's own cost, so that they are as hard on both fleets.
    seconds, joules = answers.alone()

    def energy(part: float) -> Goals:
        return Goals(energy_per_request_j=part * joules)

    def p95(part: float) -> Goals:
        return Goals(e2e_p95_s=part * seconds)

    mixes = (("intent", "extract", "shell"), ("reason", "sql", "general"))
    return [
        Shift("mix", energy(0.37), "energy_j", 0.37 * joules, tasks=mixes),
        Shift("load", p95(1.6), "latency_s", 1.6 * seconds, load=3.0),
        Shift("hardware", p95(2.0), "latency_s", 2.0 * seconds, slower=2.0),
        Shift("goals", Goals(), "energy_j", 0.32 * joules, new_goals=energy(0.32)),
    ]


def goal_recovery(answers: Answers, seed: int, *, name: str) -> Figures:
    """Requests after the shift until the next WINDOW hold the goal within 10 %."""
    shift = next(s for s in shifts_of(answers) if s.name == name)
    name = f"shift.{name}"
    world = _shifted(answers, seed, shift)
    # The same with the stated weights and no goals, for comparison.
    without_goals = _shifted(answers, seed, replace(shift, goals=Goals(), new_goals=None))
    windows = [
        _metric(world.rows[i : i + WINDOW], shift.metric) <= GOAL_TOLERANCE * shift.limit
        for i in range(BEFORE, BEFORE + AFTER - WINDOW + 1)
    ]
    settled = world.rows[BEFORE + 200 :]
    return {
        f"{name}.recovery_requests": float(
            next((i for i, holds_goal in enumerate(windows) if holds_goal), len(windows))
        ),
        f"{name}.held_after_200_ratio": float(np.mean(windows[200:])),
        f"{name}.over_goal_ratio": _metric(settled, shift.metric) / shift.limit,
        f"{name}.without_ratio": _metric(without_goals.rows[BEFORE + 200 :], shift.metric)
        / shift.limit,
        f"{name}.credit": float(np.mean([r.credit for r in settled])),
        f"{name}.without_credit": float(
            np.mean([r.credit for r in without_goals.rows[BEFORE + 200 :]])
        ),
    }


def _shifted(answers: Answers, seed: int, shift: Shift) -> World:
    rng, tasks = Random(seed), answers.tasks()
    world = World(answers, shift.goals, seed=seed, predictor=shipped(answers.fleet))
    pools = [list(range(len(answers)))] * 2
    if shift.tasks is not None:
        pools = [[i for i, t in enumerate(tasks) if t in part] for part in shift.tasks]
    rate, now = 0.3 * capacity_rps(answers, answers.largest), 0.0
    for part, count in enumerate((BEFORE, AFTER)):
        arrived = []
        for _ in range(count):
            now += rng.expovariate(rate * (shift.load if part else 1.0))
            arrived.append((now, rng.choice(pools[part])))
        if part:
            world.faults = {answers.largest: Fault(slower=shift.slower)}
            if shift.new_goals is not None:
                world.selector.set_goals(shift.new_goals)
        world.serve(arrived)
    world.finish()
    return world


def _metric(rows: Sequence[Row], metric: str) -> float:
    values = np.array([getattr(r, metric) for r in rows])
    if metric == "latency_s":
        return float(np.nanpercentile(values, 95))
    return float(np.nanmean(values))


@dataclass(frozen=True)
class Break:
    """A fault of an SLM. Where the fault is slowness, a p95 goal is set."""

    slm_id: str
    fault: Fault
    feedback_ratio: float = FEEDBACK_RATIO


BREAKS = {
    "errors": Break("sql", Fault(fails=1.0)),
    "garbled": Break("sql", Fault(wrong=1.0, garbled=True)),  # its validator detects it
    "wrong": Break("sql", Fault(wrong=1.0)),  # only feedback can detect it
    "wrong_all_judged": Break("sql", Fault(wrong=1.0), feedback_ratio=1.0),
    "slow": Break("general", Fault(slower=5.0)),
}
SETTLED, BROKEN, REPAIRED = 2000, 900, 3000  # requests before, during, after
SHORT = 100  # requests over which a broken SLM's share is taken


def broken_slm(answers: Answers, seed: int, *, kind: str) -> Figures:
    """An SLM breaks and is repaired: requests sent to it until it has lost its traffic.

    The count ends with the first SHORT consecutive requests of which the SLM gets at most
    LOST_RATIO of its usual share. So it includes the requests that revealed the fault.
    """
    broken = BREAKS[kind]
    rows = _broken(answers, seed, broken)
    before, during = rows[200:SETTLED], rows[SETTLED : SETTLED + BROKEN]
    after = rows[SETTLED + BROKEN :]

    def sent(row: Row) -> bool:
        return broken.slm_id in row.tried

    usual = float(np.mean([sent(r) for r in before]))
    lost = first_window(during, sent, SHORT, lambda share: share <= LOST_RATIO * usual)
    back = first_window(after, sent, SHORT, lambda share: share >= SHARE_RATIO * usual)
    settled = during[-400:]
    name = f"broken.{kind}"
    return {
        f"{name}.usual_share": usual,
        f"{name}.lost": float(lost < len(during)),
        f"{name}.drain_requests": float(sum(sent(r) for r in during[: lost + SHORT])),
        f"{name}.last_share_ratio": float(np.mean([sent(r) for r in settled])) / usual,
        # The remaining share due to the fleet file's rules, which ignore latency.
        f"{name}.last_rule_share": float(np.mean([sent(r) and r.path == "rule" for r in settled])),
        f"{name}.unanswered": float(sum(not r.slm for r in during)),
        f"{name}.credit": float(np.mean([r.credit for r in during])),
        f"{name}.usual_credit": float(np.mean([r.credit for r in before])),
        f"{name}.returned": float(back < len(after)),
        f"{name}.return_s": after[min(back, len(after) - 1)].at_s - after[0].at_s,
    }


def _broken(answers: Answers, seed: int, broken: Break) -> list[Row]:
    """SETTLED requests before the fault, BROKEN during it, REPAIRED after it."""
    goals = Goals()
    if broken.fault.slower > 1.0:
        goals = Goals(e2e_p95_s=2.0 * answers.alone()[0])
    world = World(
        answers,
        goals,
        seed=seed,
        predictor=shipped(answers.fleet),
        feedback_ratio=broken.feedback_ratio,
    )
    rng, now = Random(seed), 0.0
    rate = 0.3 * capacity_rps(answers, answers.largest)
    for count, faults in (
        (SETTLED, {}),
        (BROKEN, {broken.slm_id: broken.fault}),
        (REPAIRED, {}),
    ):
        world.faults = dict(faults)
        arrived = []
        for _ in range(count):
            now += rng.expovariate(rate)
            arrived.append((now, rng.randrange(len(answers))))
        world.serve(arrived)
    world.finish()
    return world.rows


def first_window(
    rows: Sequence[Any], counts: Callable[[Any], bool], length: int, holds: Callable[[float], bool]
) -> int:
    """The first index from which on `holds(share)` of the next `length` rows; else len(rows).

    A share is the mean of `counts` over the rows.
    """
    hits = np.concatenate([[0], np.cumsum([counts(r) for r in rows])])
    for place in range(len(rows) - length + 1):
        if holds(float(hits[place + length] - hits[place]) / length):
            return place
    return len(rows)
