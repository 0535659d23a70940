"""The weights follow the goals: they hold, recover after shifts, return, and never wind up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from calm_serve.goals.controller import (
    LIMIT,
    MIN_SCORED,
    GoalController,
    GoalStatus,
)
from calm_serve.goals.window import ROWS
from calm_serve.routing.scoring import evaluate, weights_of
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import (
    make_decision,
    make_fleet,
    make_goals,
    make_outcome,
    make_prediction,
    make_spec,
    make_state,
)
from calm_serve.types import DecisionPath, ServiceLevel, Weights
from tests.goal_world import RECENT, World

BEFORE, AFTER, RECOVERED = 500, 600, 200
STATED = {"latency_weight_per_s": 0.05, "energy_weight_per_j": 0.002}

SHIFTS: dict[str, dict[str, Any]] = {
    "prompts become harder": {"harder": 0.3},
    "an SLM becomes three times slower": {"slower": {"medium": 3.0}},
    "the largest SLM becomes three times slower": {"slower": {"large": 3.0}},
    "an SLM's tokens cost twice the energy": {"thirstier": {"medium": 2.0}},
    "requests come twice as fast": {"rate": 16.0},
}
# Field of the goals, metric of the world, target. All are missed badly by the stated weights.
HELD = [
    ("energy_per_request_j", "energy_j", 3.0),
    ("power_w", "power_w", 30.0),
    ("ttft_p95_s", "ttft_s", 0.4),
    ("e2e_p95_s", "e2e_s", 1.4),
]


def world(seed: int = 0, **goals: Any) -> World:
    return World(make_goals(**{**STATED, **goals}), seed=seed)


def target(world: World, name: str) -> GoalStatus:
    return next(s for s in world.selector.controller.status() if s.name == name)


@pytest.mark.parametrize(("goal", "metric", "limit"), HELD)
def test_a_goal_that_the_stated_weights_miss_is_held(goal: str, metric: str, limit: float) -> None:
    without, held = world(), world(**{goal: limit})
    without.serve(BEFORE)
    held.serve(BEFORE)
    assert without.over(metric, 200) > 1.5 * limit
    assert held.over(metric, 200) <= 1.1 * limit
    assert target(held, goal).held is True
    assert target(held, goal).feasible is True


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("goal", "metric", "limit"), HELD)
def test_goals_are_held_again_within_200_requests_after_a_shift(
    shift: str, goal: str, metric: str, limit: float
) -> None:
    shifted = world(1, **{goal: limit})
    shifted.serve(BEFORE)
    for name, value in SHIFTS[shift].items():
        setattr(shifted, name, value)
    shifted.serve(AFTER)
    goal_recovery_requests = shifted.recovery(BEFORE, metric, limit)
    assert goal_recovery_requests <= RECOVERED
    # And stay so, but for the scatter of a p95 of so few.
    assert shifted.over(metric, BEFORE + RECOVERED) <= 1.15 * limit


def test_a_quality_goal_is_held_when_prompts_become_harder() -> None:
    greedy = {"energy_weight_per_j": 0.05}
    held, without = world(min_quality=0.7, **greedy), world(**greedy)
    for each in (held, without):
        each.serve(BEFORE)
        each.harder = 0.3
        each.serve(AFTER)
    assert without.over("quality", BEFORE + RECOVERED) < 0.9 * 0.7
    assert held.recovery(BEFORE, "quality", 0.7, least=True) <= RECOVERED
    assert held.over("quality", BEFORE + RECOVERED) >= 0.95 * 0.7
    assert held.selector.weights.quality > 1.0


def test_several_goals_are_held_together() -> None:
    both = world(energy_per_request_j=4.5, e2e_p95_s=1.6, min_quality=0.7)
    both.serve(BEFORE)
    assert all(s.held and s.feasible for s in both.selector.controller.status())


def test_a_p95_goal_costs_less_quality_than_a_price_on_every_second() -> None:
    held = world(e2e_p95_s=1.4)
    held.serve(BEFORE)
    # The cheapest such price, of many, that holds the same goal.
    for price in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0):
        priced = world(latency_weight_per_s=price)
        priced.serve(BEFORE)
        if priced.over("e2e_s", 200) <= 1.1 * 1.4:
            break
    assert priced.over("e2e_s", 200) <= 1.1 * 1.4
    assert held.over("quality", 200) > priced.over("quality", 200) + 0.02


def test_without_targets_the_weights_are_the_operators() -> None:
    free = world()
    free.serve(200)
    assert {d.weights for d in free.decisions} == {weights_of(free.goals)}
    assert free.selector.controller.status() == []


def test_weights_come_back_when_the_pressure_goes() -> None:
    eased = world(e2e_p95_s=1.4)
    eased.serve(BEFORE)
    assert eased.selector.weights.late_e2e_per_s > 0.0
    eased.selector.predictor = eased
    eased.slower = dict.fromkeys(("small", "medium", "large"), 0.1)
    eased.serve(AFTER)
    assert eased.selector.weights == replace(
        weights_of(eased.goals), late_e2e_after_s=eased.selector.weights.late_e2e_after_s
    )
    assert target(eased, "e2e_p95_s").held is True


def test_an_infeasible_target_is_reported_and_winds_nothing_up() -> None:
    hopeless = world(ttft_p95_s=0.001)
    hopeless.serve(BEFORE)
    status = target(hopeless, "ttft_p95_s")
    assert (status.held, status.feasible) == (False, False)
    assert hopeless.controller._x.max() <= LIMIT
    hopeless.selector.set_goals(make_goals(**STATED, ttft_p95_s=0.4))
    hopeless.serve(AFTER)
    assert hopeless.recovery(BEFORE, "ttft_s", 0.4) <= RECOVERED


@pytest.mark.parametrize(
    ("goal", "weight"),
    [
        ("energy_per_request_j", "energy_per_j"),
        ("ttft_p95_s", "late_ttft_per_s"),
        ("e2e_p95_s", "late_e2e_per_s"),
    ],
)
def test_a_target_far_out_of_reach_gets_as_near_as_it_can(goal: str, weight: str) -> None:
    hopeless, stated = world(**{goal: 1e-6}), world()
    hopeless.serve(BEFORE)
    assert getattr(hopeless.selector.weights, weight) > getattr(stated.selector.weights, weight)
    assert hopeless.shares(BEFORE - RECENT)["small"] > 0.9


def test_quality_wins_over_energy_where_both_cannot_hold() -> None:
    torn = world(min_quality=0.8, energy_per_request_j=1.0)
    torn.serve(BEFORE)
    assert torn.over("quality", 200) >= 0.9 * 0.8
    assert target(torn, "min_quality").feasible is True
    assert target(torn, "energy_per_request_j").feasible is False


def test_latency_wins_over_energy_where_both_cannot_hold() -> None:
    # Everything to the small SLM would save energy; the target is below what even that takes.
    torn = world(e2e_p95_s=1.4, energy_per_request_j=0.1)
    torn.serve(BEFORE)
    assert torn.over("e2e_s", 200) <= 1.1 * 1.4
    assert target(torn, "energy_per_request_j").feasible is False


def test_the_power_budget_is_divided_among_the_routers() -> None:
    shared = world(power_w=60.0)
    shared.selector.controller = GoalController(shared.goals, routers=2)
    shared.serve(BEFORE)
    assert shared.over("power_w", 200) <= 1.1 * 30.0
    assert target(shared, "power_w").measured == pytest.approx(60.0, rel=0.3)


def test_mostly_pinned_traffic_keeps_the_last_weights() -> None:
    pinned = world(energy_per_request_j=3.0)
    pinned.serve(BEFORE)
    pinned.rule_ratio, pinned.rate = 1.0, 2.0
    pinned.serve(ROWS + 50)
    last = pinned.selector.weights
    pinned.serve(ROWS)
    assert pinned.selector.weights == last
    assert last.energy_per_j > STATED["energy_weight_per_j"]
    assert target(pinned, "energy_per_request_j").held is False


def test_equal_requests_give_equal_weights() -> None:
    runs = [world(3, e2e_p95_s=1.4, energy_per_request_j=4.0) for _ in range(2)]
    for run in runs:
        run.serve(300)
    first, second = ([d.weights for d in run.decisions] for run in runs)
    assert first == second
    assert len(set(first)) > 5


def test_a_record_replays_with_the_weights_that_it_carries() -> None:
    moved = world(e2e_p95_s=1.4)
    moved.serve(BEFORE)
    decision = moved.decisions[-1]
    assert decision.weights is not None
    states = {i: make_state(i) for i in moved.selector.specs}
    for candidate in decision.candidates:
        assert candidate.prediction is not None
        again = evaluate(
            decision.context.slo,
            candidate.prediction,
            states[candidate.slm_id],
            decision.weights,
            general=candidate.general,
        )
        assert again == candidate


def test_no_memory_grows_with_the_requests() -> None:
    small = world(e2e_p95_s=1.4)
    small.serve(300)
    window = small.controller._window
    before = window._raw.nbytes
    small.serve(600)
    assert window._raw.nbytes == before
    assert len(small.controller._pending) <= ROWS


def test_unread_outcomes_are_bounded_without_a_tick() -> None:
    controller = GoalController(make_goals())
    for number in range(3 * ROWS):
        controller.learn(make_decision("small", "large"), make_outcome(at=float(number)))
    assert len(controller._pending) == ROWS


def test_too_few_requests_move_nothing() -> None:
    controller = GoalController(make_goals(ttft_p95_s=0.001))
    for number in range(MIN_SCORED - 1):
        controller.learn(make_decision("small", "large"), make_outcome(at=float(number)))
    assert controller.step() == weights_of(make_goals())


def test_failed_and_unmeasured_requests_are_not_measured() -> None:
    controller = GoalController(make_goals(ttft_p95_s=1.0, energy_per_request_j=1.0))
    controller.learn(make_decision("small"), make_outcome(status="error"))
    controller.learn(make_decision("small"), make_outcome(ttft_s=None, energy_j=None))
    assert [(s.measured, s.held, s.samples) for s in controller.status()] == [(None, None, 0)] * 2


def test_rules_pins_and_baselines_count_as_measured_and_never_as_a_choice() -> None:
    goals = make_goals(ttft_p95_s=0.01)
    controller = GoalController(goals)
    paths = (DecisionPath.RULE, DecisionPath.PINNED, DecisionPath.BASELINE)
    for number in range(60):
        decision = make_decision("small", "large", path=paths[number % 3])
        controller.learn(decision, make_outcome(at=float(number)))
    assert controller.step() == weights_of(goals)
    assert controller.status()[0].samples == 60


def test_a_reply_of_another_slm_after_a_failover_is_no_measurement() -> None:
    controller = GoalController(make_goals(ttft_p95_s=1.0))
    for number in range(40):
        outcome = make_outcome(slm_id="large", at=float(number), ttft_s=9.0)
        controller.learn(make_decision("small", "large"), outcome)
    controller.step()
    assert controller._window.scored == 0
    assert controller.status()[0].samples == 40


def test_an_slm_that_leaves_is_forgotten() -> None:
    gone = world(e2e_p95_s=1.4)
    gone.serve(300)
    gone.selector.set_fleet(make_fleet(make_spec("small"), make_spec("large")))
    assert set(gone.controller._window._slms) == {"small", "large"}
    gone.serve(100)
    assert gone.over("e2e_s", 300) < 5.0


def test_new_goals_start_from_what_is_already_known() -> None:
    changed = world(energy_per_request_j=100.0)
    changed.serve(300)
    changed.selector.set_goals(make_goals(**STATED, energy_per_request_j=3.0))
    assert changed.selector.weights == weights_of(changed.selector.goals)
    changed.selector.tick()
    assert changed.selector.weights.energy_per_j > STATED["energy_weight_per_j"]


def test_seconds_beyond_the_free_part_cost() -> None:
    weights = Weights(0.0, 0.0, 0.0, late_e2e_per_s=2.0, late_e2e_after_s=1.0)
    late, early = (
        evaluate(ServiceLevel(), make_prediction(ttft_s=t, tpot_s=0.0), make_state(), weights)
        for t in (1.5, 0.9)
    )
    assert (late.latency, early.latency) == (1.0, 0.0)
    first = Weights(0.0, 0.0, 0.0, late_ttft_per_s=2.0, late_ttft_after_s=1.0)
    slow = make_prediction(ttft_s=1.25, tpot_s=1.0)
    assert evaluate(ServiceLevel(), slow, make_state(), first).latency == 0.5


def test_the_goals_version_names_the_goals_and_not_the_moving_weights() -> None:
    selector = ModelSelector(make_fleet(), make_goals(ttft_p95_s=1.0))
    version = selector.versions.goals
    selector.weights = replace(selector.weights, quality=2.0)
    assert selector.versions.goals == version
    selector.set_goals(make_goals(ttft_p95_s=2.0))
    assert selector.versions.goals != version
