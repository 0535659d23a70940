"""The simulated part of the `paper` experiment: its world's arithmetic, and what it counts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calm_serve.config import Goals
from calm_serve.config.residency import ResidencyOptions
from calm_serve.testing import make_context, make_fleet, make_spec
from load_tests.common.workloads import Request
from load_tests.paper.simulated.adaptation import first_window
from load_tests.paper.simulated.answers import Answers, Speed, fit
from load_tests.paper.simulated.benchmark import interval, summarised
from load_tests.paper.simulated.call import Fault, Row
from load_tests.paper.simulated.scenarios import capacity_rps, with_requests
from load_tests.paper.simulated.world import World

SPEED = Speed(
    first_s=0.02,
    tpot_s=0.01,
    slowdown=0.1,
    watts=6.0,
    request_j=0.5,
    wake_s=2.0,
    wake_j=12.0,
)
REQUESTS = 8


def make_answers(*slms: str, right: tuple[float, ...] = ()) -> Answers:
    """Equal requests; `right` is the mark of every answer of each SLM."""
    marks = np.tile(np.array(right or (1.0,) * len(slms)), (REQUESTS, 1))
    tables = dict.fromkeys(("exact", "credit"), marks)
    tables |= {name: np.full((REQUESTS, len(slms)), 11.0) for name in ("output_tokens",)}
    tables |= {"prompt_tokens": np.full((REQUESTS, len(slms)), 40.0)}
    requests: list[Request] = []
    contexts = [make_context() for _ in range(REQUESTS)]
    fleet = make_fleet(*(make_spec(i) for i in slms))
    return Answers(requests, contexts, slms, tables, fleet, dict.fromkeys(slms, SPEED))


def run(answers: Answers, count: int = 40, every_s: float = 1.0, **options: object) -> World:
    world = World(answers, Goals(exploration_ratio=0.0), seed=1, **options)  # type: ignore[arg-type]
    world.serve([(every_s * n, n % REQUESTS) for n in range(count)])
    world.finish()
    return world


def test_a_step_shared_by_more_costs_each_of_them_less_energy_and_more_time() -> None:
    assert SPEED.pace(1) == 1.0
    assert SPEED.pace(6) == pytest.approx(1.5)
    assert SPEED.joules(10, 1) == pytest.approx(0.5 + 10 * 0.06)
    assert SPEED.joules(10, 6) == pytest.approx(0.5 + 10 * 0.06 * 1.5 / 6)


def test_a_fit_gives_back_the_latency_and_the_energy_that_were_measured() -> None:
    tokens = np.linspace(5.0, 60.0, 200)
    pace = 1.0 + 0.05 * 7
    energy = 0.3 + tokens * 6.0 * 0.004 * pace / 8
    tables = {
        "output_tokens": tokens[:, None],
        "latency_s": (pace * (0.03 + tokens * 0.004))[:, None],
        "energy_j": energy[:, None],
    }
    speed = fit(tables, 0, 0.004, 0.2)  # the lesser of the two slowdowns counts
    assert speed.slowdown == pytest.approx(0.05)
    assert speed.first_s == pytest.approx(0.03)
    assert speed.request_j == pytest.approx(0.3)
    assert speed.joules(60.0, 8) == pytest.approx(energy[-1])


def test_a_lone_request_takes_its_own_time_and_energy() -> None:
    world = run(make_answers("one"))
    for row in world.rows:
        assert row.latency_s == pytest.approx(0.02 + 10 * 0.01, rel=0.11)  # with its jitter
        assert row.energy_j == pytest.approx(SPEED.joules(11, 1))
        assert (row.slm, row.error, row.exact) == ("one", "", 1.0)


def test_equal_arguments_give_equal_rows() -> None:
    first, second = (run(make_answers("one", "two"), every_s=0.01) for _ in range(2))
    assert first.rows == second.rows


def test_requests_beyond_every_queue_are_shed_and_none_is_lost() -> None:
    world = run(make_answers("one"), count=400, every_s=1e-4)
    errors = [r.error for r in world.rows]
    assert 0 < errors.count("shed") < 400
    assert all(bool(r.slm) != bool(r.error) for r in world.rows)
    assert world.inside == {"one": 0}


def test_a_failing_slm_is_left_and_its_requests_are_answered_elsewhere() -> None:
    answers = make_answers("good", "bad")
    world = World(answers, Goals(exploration_ratio=0.0), seed=1)
    world.faults = {"bad": Fault(fails=1.0)}
    world.serve([(0.5 * n, n % REQUESTS) for n in range(60)])
    world.finish()
    assert all(r.slm == "good" for r in world.rows)
    assert sum("bad" in r.tried for r in world.rows[40:]) < 5


def test_wrong_answers_lower_the_grades_and_the_calibration_factor() -> None:
    answers = make_answers("one", right=(1.0,))
    world = World(answers, Goals(), seed=1)
    world.faults = {"one": Fault(wrong=1.0)}
    world.serve([(float(n), n % REQUESTS) for n in range(60)])
    world.finish()
    assert {r.credit for r in world.rows} == {0.0}
    assert world.state(world.selector.specs["one"]).calibration_factor < 0.5


def test_at_half_memory_a_sleeping_slm_wakes_in_its_time_and_costs_its_energy() -> None:
    answers = make_answers("one", "two")
    size = answers.fleet.slms[0].declared_bytes
    options = ResidencyOptions.model_validate({"memory_budget_bytes": size, "policy": "lru"})
    world = World(
        answers,
        Goals.model_validate({"policy": {"name": "single", "slm": "two"}}),
        seed=1,
        residency=options,
    )
    world.serve([(5.0 * n, n % REQUESTS) for n in range(4)])
    world.finish()
    assert world.memory is not None
    first, *others = world.rows
    assert not first.hit
    assert all(r.hit for r in others)
    assert first.latency_s == pytest.approx(SPEED.wake_s + others[0].latency_s, rel=0.05)
    assert (world.memory.planner.swaps, world.memory.wake_j) == (1, SPEED.wake_j)


def test_capacity_counts_slots_at_their_slowed_pace() -> None:
    answers = make_answers("one")
    slots = answers.fleet.slms[0].limits.max_num_seqs
    busy_s = SPEED.pace(slots) * (0.02 + 11 * 0.01)
    assert capacity_rps(answers, "one") == pytest.approx(slots / busy_s)


def test_every_request_comes_once_before_any_again() -> None:
    drawn = [
        r for _, r in with_requests(make_answers("one"), [float(n) for n in range(20)], seed=3)
    ]
    assert sorted(drawn[:REQUESTS]) == list(range(REQUESTS))
    assert sorted(drawn[REQUESTS : 2 * REQUESTS]) == list(range(REQUESTS))


def test_the_first_window_is_the_first_from_which_the_share_holds() -> None:
    rows = [Row(float(n), 0, chosen="a" if n < 30 else "b") for n in range(100)]

    def is_a(row: Row) -> bool:
        return row.chosen == "a"

    assert first_window(rows, is_a, 20, lambda share: share <= 0.25) == 25
    assert first_window(rows, is_a, 20, lambda share: share > 1.0) == len(rows)


def test_intervals_are_students_and_absent_for_one_seed() -> None:
    low, high = interval([1.0, 2.0, 3.0])
    assert (high - low) / 2 == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert summarised({"x": [1.0], "y": [1.0, 3.0]}).keys() == {"x", "y", "y_ci95"}
