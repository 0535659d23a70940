"""What a router makes of the findings: /v1/fleet, calibrated decisions."""

from __future__ import annotations

from dataclasses import asdict

from calm_serve.protocol.topics import Alarm, MonitorFindings, SLMEnergy, UnfamiliarAnswers
from calm_serve.routing.selector import ModelSelector
from calm_serve.telemetry.content_gain import MIN_DECISIONS
from calm_serve.testing import (
    FakeClock,
    decision_for,
    make_context,
    make_decision,
    make_fleet,
    make_goals,
    make_prediction,
    make_spec,
    make_state,
)
from calm_serve.types import Candidate, DecisionPath
from deployments.router.fleet_view import FleetView, MonitorView

FINDINGS = MonitorFindings(
    calibration_factors={"small": 0.4},
    calibration_error=0.03,
    alarms=(Alarm("quality", "small", size=-0.8, since=1.0),),
)


def test_the_fleet_document_has_alarms_choices_and_each_slms_calibration_and_energy() -> None:
    clock = FakeClock(100.0)
    view = FleetView(make_fleet())
    view.monitor = MonitorView(clock)
    view.set_findings(FINDINGS)
    view.monitor.set_energy({"small": SLMEnergy(5.0, 1.0, 6.0, "counter", False, None, at=90.0)})
    document = view.snapshot({})
    assert document["alarms"] == [asdict(a) for a in FINDINGS.alarms]
    assert document["choices"]["calibration_error"] == 0.03
    small, large = document["slms"]
    assert small["calibration_factor"] == 0.4
    assert small["energy"] == {
        "requests_j": 5.0,
        "idle_j": 1.0,
        "total_j": 6.0,
        "source": "counter",
        "estimated": False,
        "attribution_error_ratio": None,
        "age_s": 10.0,
    }
    assert (large["calibration_factor"], large["energy"]) == (1.0, {})


def test_a_router_that_always_takes_the_same_slm_raises_the_alarm_and_ends_it() -> None:
    monitor = MonitorView(FakeClock())
    sides = [("small", "large"), ("large", "small")]

    def choose(best: str, other: str) -> None:
        candidates = (
            Candidate(best, prediction=make_prediction(best), quality=0.9, score=0.9),
            Candidate(other, prediction=make_prediction(other), quality=0.1, score=0.1),
        )
        monitor.chose(make_decision(best, other, candidates=candidates))

    for _ in range(MIN_DECISIONS):
        choose(*sides[0])
    (alarm,) = monitor.fleet()["alarms"]
    assert (alarm["kind"], alarm["detail"]) == (
        "constant_selector",
        "small is best for every prompt",
    )
    for number in range(MIN_DECISIONS):
        choose(*sides[number % 2])
    assert monitor.fleet()["alarms"] == []


def selector(factors: dict[str, float]) -> ModelSelector:
    fleet = make_fleet(
        make_spec("small", priors={"quality": 0.8}),
        make_spec("large", priors={"quality": 0.6}),
        markers={"sql": "select"},
        rules=[{"name": "sql", "marker": "sql", "slms": ["small"]}],
    )
    return ModelSelector(
        fleet,
        make_goals(),
        read_state=lambda spec: make_state(spec.id, calibration_factor=factors.get(spec.id, 1.0)),
    )


def test_a_decision_weighs_the_corrected_quality_and_records_the_raw_prediction() -> None:
    assert decision_for(selector({}), make_context()).slm_id == "small"
    decision = decision_for(selector({"small": 0.5}), make_context())
    assert decision.slm_id == "large"
    small = next(c for c in decision.candidates if c.slm_id == "small")
    assert small.prediction is not None
    assert (small.prediction.success_ratio, small.quality) == (0.8, 0.4)


def test_a_rule_does_not_name_an_slm_that_has_lost_its_quality() -> None:
    context = make_context(markers=("sql",))
    assert decision_for(selector({}), context).path is DecisionPath.RULE
    assert decision_for(selector({"small": 0.7}), context).path is DecisionPath.RULE
    decision = decision_for(selector({"small": 0.3}), context)
    assert (decision.path, decision.slm_id) == (DecisionPath.PRIOR, "large")


def test_quality_and_share_of_unfamiliar_prompts_reach_decisions_and_the_fleet_document() -> None:
    view = FleetView(make_fleet())
    answers = {"small": UnfamiliarAnswers(7.0, 0.9)}
    view.set_findings(MonitorFindings(unfamiliar_ratio=0.31, unfamiliar_answers=answers))
    document = view.snapshot({})
    assert document["choices"]["unfamiliar_ratio"] == 0.31
    small, large = document["slms"]
    assert small["unfamiliar_answers"] == {"answers": 7.0, "quality": 0.9}
    assert large["unfamiliar_answers"] is None
    states = [view.state(spec) for spec in make_fleet().slms]
    assert [(s.unfamiliar_answers, s.unfamiliar_quality) for s in states] == [
        (7.0, 0.9),
        (0.0, 0.0),
    ]
