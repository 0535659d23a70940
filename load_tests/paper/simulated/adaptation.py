"""Simulated changes of the `paper` experiment: workload, hardware, goals, SLMs that break.

Counts are of requests from the change on. Each function runs one seed and returns plain figures.
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
RECENT = 100  # requests over which a goal is looked at
HELD = 1.1  # a goal is held within 10 %
FEEDBACK_RATIO = 0.3  # of the answers somebody says how good they were, unless a figure's name says

SHARE_RATIO = 0.8  # of its usual share: an SLM that was repaired, or that came, has its traffic
LOST_RATIO = 0.2  # a broken SLM has lost its traffic when it gets 20 % of its share


@dataclass(frozen=True)
class Shift:
    """What changes, and the goal that has to hold afterwards."""

    name: str
    goals: Goals
    metric: str  # "energy_j" (mean) or "latency_s" (95th percentile)
    limit: float
    new_goals: Goals | None = None
    load: float = 1.0
    slower: float = 1.0  # the largest SLM
    tasks: tuple[tuple[str, ...], tuple[str, ...]] | None = None  # before, after


SHIFTS = ("mix", "load", "hardware", "goals")


def shifts_of(answers: Answers) -> list[Shift]:
    """Shifts under which the stated weights alone would miss the goal (`shift.*.without`)."""
    # In units of the largest SLM's own cost, so that they mean the same on both fleets.
    seconds, joules = answers.alone()

    def energy(part: float) -> Goals:
        return Goals(energy_per_request_j=part * joules)

    def late(part: float) -> Goals:
        return Goals(e2e_p95_s=part * seconds)

    mixes = (("intent", "extract", "shell"), ("reason", "sql", "general"))
    return [
        Shift("mix", energy(0.37), "energy_j", 0.37 * joules, tasks=mixes),
        Shift("load", late(1.6), "latency_s", 1.6 * seconds, load=3.0),
        Shift("hardware", late(2.0), "latency_s", 2.0 * seconds, slower=2.0),
        Shift("goals", Goals(), "energy_j", 0.32 * joules, new_goals=energy(0.32)),
    ]


def goal_recovery(answers: Answers, seed: int, *, name: str) -> Figures:
    """Requests after the shift until the next RECENT hold the goal within 10 %."""
    shift = next(s for s in shifts_of(answers) if s.name == name)
    name = f"shift.{name}"
    world = _shifted(answers, seed, shift)
    # The same with the weights as stated: what the goals are worth.
    plain = _shifted(answers, seed, replace(shift, goals=Goals(), new_goals=None))
    windows = [
        _metric(world.rows[i : i + RECENT], shift.metric) <= HELD * shift.limit
        for i in range(BEFORE, BEFORE + AFTER - RECENT + 1)
    ]
    settled = world.rows[BEFORE + 200 :]
    return {
        f"{name}.recovery_requests": float(
            next((i for i, held in enumerate(windows) if held), len(windows))
        ),
        f"{name}.held_after_200_ratio": float(np.mean(windows[200:])),
        f"{name}.over_goal_ratio": _metric(settled, shift.metric) / shift.limit,
        f"{name}.without_ratio": _metric(plain.rows[BEFORE + 200 :], shift.metric) / shift.limit,
        f"{name}.credit": float(np.mean([r.credit for r in settled])),
        f"{name}.without_credit": float(np.mean([r.credit for r in plain.rows[BEFORE + 200 :]])),
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
                world.loop.set_goals(shift.new_goals)
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
    """What happens to which SLM. A p95 goal is set where slowness is the fault."""

    slm_id: str
    fault: Fault
    feedback_ratio: float = FEEDBACK_RATIO


BREAKS = {
    "errors": Break("sql", Fault(fails=1.0)),
    "garbled": Break("sql", Fault(wrong=1.0, garbled=True)),  # its own format check says so
    "wrong": Break("sql", Fault(wrong=1.0)),  # only feedback can say so
    "wrong_all_judged": Break("sql", Fault(wrong=1.0), feedback_ratio=1.0),
    "slow": Break("general", Fault(slower=5.0)),
}
SETTLED, BROKEN, REPAIRED = 2000, 900, 3000  # requests before, during, after
SHORT = 100  # requests ahead over which a broken SLM's share is counted


def broken_slm(answers: Answers, seed: int, *, kind: str) -> Figures:
    """An SLM breaks, and is repaired: its own requests until it has lost its traffic.

    Counted are all that it got until the end of the first SHORT requests in which it had at most
    LOST_RATIO of its usual share, so those that found it out are in it.
    """
    broken = BREAKS[kind]
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
    before, during = world.rows[200:SETTLED], world.rows[SETTLED : SETTLED + BROKEN]
    after = world.rows[SETTLED + BROKEN :]

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
        # Of what remains, what the fleet file's rules name, which weigh no latency.
        f"{name}.last_rule_share": float(np.mean([sent(r) and r.path == "rule" for r in settled])),
        f"{name}.unanswered": float(sum(not r.slm for r in during)),
        f"{name}.credit": float(np.mean([r.credit for r in during])),
        f"{name}.usual_credit": float(np.mean([r.credit for r in before])),
        f"{name}.returned": float(back < len(after)),
        f"{name}.return_s": after[min(back, len(after) - 1)].at_s - after[0].at_s,
    }


def first_window(
    rows: Sequence[Any], counts: Callable[[Any], bool], length: int, holds: Callable[[float], bool]
) -> int:
    """The first place from which the share of the next `length` rows holds; else all of them."""
    hits = np.concatenate([[0], np.cumsum([counts(r) for r in rows])])
    for place in range(len(rows) - length + 1):
        if holds(float(hits[place + length] - hits[place]) / length):
            return place
    return len(rows)
