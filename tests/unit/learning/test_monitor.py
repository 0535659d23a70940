"""What the outcome monitor finds in a stream of outcomes, and what it publishes."""

from __future__ import annotations

import logging
from random import Random
from typing import Any

import pytest

from calm_serve.learning.monitor import (
    PUBLISH_S,
    RETRAIN_OUTCOMES,
    RETRAIN_PAUSE_S,
    OutcomeMonitor,
)
from calm_serve.learning.quality import UnfamiliarQuality
from calm_serve.protocol.topics import MonitorFindings
from calm_serve.telemetry.alarms import LIFETIME_S, MAX_ALARMS, Alarms
from calm_serve.testing import FakeClock, make_outcome, make_spec
from calm_serve.types import (
    Novelty,
    Outcome,
    Prediction,
    PredictorVersion,
    QualitySignal,
    Versions,
)


class World:
    """An outcome monitor, what it published, and how often it requested a training."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.published: list[MonitorFindings] = []
        self.trainings = 0
        self.monitor = OutcomeMonitor(self.clock, self.clock, self.published.append, self._train)
        self._count = 0

    def outcome(self, **fields: Any) -> Outcome:
        """An outcome with an id of its own; a second passes."""
        self._count += 1
        self.clock.advance(1.0)
        slm_id = fields.get("slm_id", "small")
        values = {"predicted": predicted(slm_id=slm_id), **fields}
        return make_outcome(f"o{self._count}", **values)

    def send(self, **fields: Any) -> None:
        """One outcome as a batch."""
        self.monitor.observe([self.outcome(**fields)])

    @property
    def last(self) -> MonitorFindings:
        """The newest published findings."""
        return self.published[-1]

    def alarms(self) -> set[tuple[str, str]]:
        """Kinds and SLMs of the alarms that are on."""
        return {(a.kind, a.slm) for a in self.last.alarms}

    def _train(self) -> None:
        self.trainings += 1


@pytest.fixture
def world() -> World:
    return World()


def predicted(
    success_ratio: float = 0.9, tokens: float = 10.0, slm_id: str = "small"
) -> Prediction:
    return Prediction(slm_id, success_ratio, tokens, 0.05, 0.01, 1.0)


def feedback(value: float) -> tuple[QualitySignal, ...]:
    return (QualitySignal("feedback", value),)


@pytest.mark.parametrize(("output_tokens", "falls"), [(10, False), (30, True)])
def test_bad_answers_of_another_length_lower_the_factor_sooner(
    output_tokens: int, falls: bool
) -> None:
    world, draw = World(), Random(4)
    expected = predicted(0.5)
    for _ in range(100):
        signals = feedback(float(draw.random() < 0.5))
        world.send(predicted=expected, output_tokens=10, signals=signals)
    for _ in range(25):
        world.send(predicted=expected, output_tokens=output_tokens)
    assert (("tokens", "small") in world.alarms()) is falls
    for _ in range(10):
        world.send(predicted=expected, output_tokens=output_tokens, signals=feedback(0.0))
    assert (world.monitor._factors["small"] < 0.5) is falls


def test_a_collapse_lowers_the_factor_and_raises_one_alarm_logged_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    draw = Random(1)
    for _ in range(100):
        world.send(signals=feedback(float(draw.random() < 0.9)))
    assert world.last.calibration_factors.get("small", 1.0) > 0.9
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            world.send(signals=feedback(0.0))
    assert world.last.calibration_factors["small"] < 0.3
    assert world.alarms() == {("quality", "small")}
    assert len(caplog.records) == 1


def test_feedback_counts_whether_it_comes_before_or_after_its_outcome(world: World) -> None:
    for _ in range(20):
        first, second = world.outcome(), world.outcome(slm_id="large")
        world.monitor.feedback(first.outcome_id, feedback(0.0))
        world.monitor.observe([first, second])
        world.monitor.feedback(second.outcome_id, feedback(0.0))
    factors = world.last.calibration_factors
    assert factors["small"] == factors["large"] < 0.4


def test_an_outcome_that_is_delivered_twice_counts_once(world: World) -> None:
    outcome = world.outcome(signals=feedback(0.0))
    once, twice = World(), World()
    once.monitor.observe([outcome])
    twice.monitor.observe([outcome, outcome])
    twice.monitor.observe([outcome])
    assert once.last == twice.last


def test_requests_without_an_slm_change_no_finding(world: World) -> None:
    world.send(predicted=predicted())
    before = world.monitor.calibration_error(), set(world.monitor._slms)
    world.monitor.observe(
        [Outcome(f"refused-{i}", "", status="rejected", failure="no_slm") for i in range(500)]
    )
    assert (world.monitor.calibration_error(), set(world.monitor._slms)) == before
    assert world.alarms() == set()


def test_a_factor_fades_by_time_alone(world: World) -> None:
    for _ in range(30):
        world.send(signals=feedback(0.0))
    assert world.last.calibration_factors["small"] < 0.3
    for _ in range(300):
        world.clock.advance(5.0)
        world.monitor.tick()
    assert world.last.calibration_factors.get("small", 1.0) > 0.9


def test_a_new_predictor_is_not_corrected_for_what_the_old_one_got_wrong(world: World) -> None:
    for _ in range(30):
        world.send(signals=feedback(0.0))
    assert world.last.calibration_factors["small"] < 0.3
    learned = predicted(0.1)
    world.send(versions=Versions(PredictorVersion("newer"), "goals", "fleet"), predicted=learned)
    assert (world.last.calibration_factors, world.alarms()) == ({}, set())
    for _ in range(5):
        world.send(signals=feedback(0.0))  # late answers to decisions of the old one
    assert world.last.calibration_factors.get("small", 1.0) > 0.3


def test_a_predictor_with_other_lengths_is_no_drift(world: World) -> None:
    draw = Random(8)
    for number in range(600):
        version, tokens = ("old", 10.0) if number < 300 else ("new", 25.0)
        world.send(
            versions=Versions(PredictorVersion(version), "goals", "fleet"),
            predicted=predicted(tokens=tokens),
            output_tokens=round(25 * draw.lognormvariate(0.0, 0.3)),
        )
    assert world.alarms() == set()


def test_answers_that_an_slms_own_validator_passes_count_as_usual_from_the_first_on(
    world: World,
) -> None:
    world.send()
    world.monitor.set_slms([make_spec("small", validator="sql"), make_spec("large")])
    for _ in range(60):
        world.send()
    for _ in range(10):
        world.send(signals=(QualitySignal("validator:sql", 0.0),))
    assert world.last.calibration_factors["small"] < 0.5
    assert ("quality", "small") in world.alarms()


def test_an_slm_named_by_rules_is_compared_with_its_usual_score(world: World) -> None:
    for _ in range(50):
        world.send(predicted=None, path="rule", signals=feedback(1.0))
    assert "small" not in world.last.calibration_factors
    for _ in range(20):
        world.send(predicted=None, path="rule", signals=feedback(0.0))
    assert world.last.calibration_factors["small"] < 0.5


def test_answers_twice_as_long_as_before_are_drift_that_retrains_once(world: World) -> None:
    draw = Random(2)
    for _ in range(200):
        world.send(output_tokens=round(10 * draw.lognormvariate(0.0, 0.3)))
    assert world.alarms() == set()
    for _ in range(RETRAIN_OUTCOMES + 40):
        world.send(output_tokens=round(25 * draw.lognormvariate(0.0, 0.3)))
    assert world.alarms() == {("tokens", "small")}
    assert world.trainings == 1


def test_a_replica_that_becomes_slow_is_named_and_does_not_retrain(world: World) -> None:
    draw = Random(3)
    for number in range(700):
        slow = 2.5 if number > 400 else 1.0
        for replica, factor in (("r1", 1.0), ("r2", slow)):
            tpot_s = 0.01 * factor * draw.lognormvariate(0.0, 0.2)
            world.send(replica_id=replica, tpot_s=tpot_s)
    (alarm,) = world.last.alarms
    assert (alarm.kind, alarm.slm, alarm.replica) == ("speed", "small", "r2")
    assert alarm.size == pytest.approx(2.5, rel=0.3)
    assert world.trainings == 0


def test_other_prompts_are_drift_of_the_fleet(world: World) -> None:
    draw = Random(4)
    for _ in range(1_500):
        world.send(buckets=tuple(sorted(draw.sample(range(1024, 1040), 6))))
    assert ("prompt_mix", "") not in world.alarms()
    for _ in range(400):
        world.send(buckets=tuple(sorted(draw.sample(range(1040, 1056), 6))))
    assert ("prompt_mix", "") in world.alarms()
    assert world.trainings == 1


def test_drift_that_goes_on_retrains_no_more_often_than_the_pause(world: World) -> None:
    draw = Random(5)
    for number in range(int(3 * RETRAIN_PAUSE_S)):
        level = 25 if number // 150 % 2 else 10
        world.send(output_tokens=round(level * draw.lognormvariate(0.0, 0.3)))
    assert 1 <= world.trainings <= 3


def test_a_wrong_predictor_is_a_calibration_alarm_until_it_is_right_again(world: World) -> None:
    draw = Random(6)
    for number in range(300):
        # Too high as often as too low: no factor helps.
        wrong = predicted(0.9 if number % 2 else 0.1)
        world.send(signals=feedback(float(draw.random() < 0.5)), predicted=wrong)
    assert ("calibration", "") in world.alarms()
    assert world.last.calibration_error == pytest.approx(0.4, abs=0.1)
    right = predicted(0.5)
    for _ in range(600):
        world.send(signals=feedback(float(draw.random() < 0.5)), predicted=right)
    assert ("calibration", "") not in world.alarms()


def test_statistics_alone_are_published_every_few_seconds_only(world: World) -> None:
    for _ in range(100):
        world.monitor.observe([make_outcome(f"fast{world.clock()}", slm_id="small")])
        world.clock.advance(0.1)
    assert len(world.published) <= 100 * 0.1 / PUBLISH_S + 2


def test_alarms_end_by_time_and_keep_their_start_while_renewed() -> None:
    clock = FakeClock(0.0)
    alarms = Alarms(clock)
    assert alarms.start("speed", "small", 2.0) is not None
    clock.advance(LIFETIME_S / 2)
    assert alarms.start("speed", "small", 3.0) is None
    (alarm,) = alarms.current()
    assert (alarm.since, alarm.size) == (0.0, 3.0)
    clock.advance(LIFETIME_S - 1.0)
    assert [alarm.slm for alarm in alarms.current()] == ["small"]
    clock.advance(2.0)
    assert alarms.current() == ()


def test_alarms_are_bounded() -> None:
    alarms = Alarms(FakeClock())
    for number in range(3 * MAX_ALARMS):
        alarms.start("speed", f"slm {number}", 1.0)
    assert len(alarms.current()) == MAX_ALARMS


FAMILIAR, UNFAMILIAR = Novelty(0.1, 0.3), Novelty(0.6, 0.3)


def rated(world: World, score: float, **fields: Any) -> None:
    """One answer with feedback."""
    world.send(signals=(QualitySignal("feedback", score),), **fields)


def test_labels_of_unfamiliar_prompts_move_no_calibration_factor() -> None:
    familiar, unfamiliar = World(), World()
    for _ in range(60):
        rated(familiar, 0.0, novelty=FAMILIAR)
        rated(unfamiliar, 0.0, novelty=UNFAMILIAR)
    assert familiar.last.calibration_factors["small"] < 0.4
    assert unfamiliar.last.calibration_factors == {}


def test_quality_on_unfamiliar_prompts_is_published_with_its_number_of_labels(world: World) -> None:
    for number in range(10):
        rated(world, float(number < 8), novelty=UNFAMILIAR)
        rated(world, 0.0, novelty=FAMILIAR)
    world.clock.advance(PUBLISH_S)
    world.monitor.tick()
    found = world.last.unfamiliar_answers
    assert set(found) == {"small"}
    assert (found["small"].answers, found["small"].quality) == (10.0, pytest.approx(0.8))


def test_late_feedback_on_an_unfamiliar_prompt_counts_too(world: World) -> None:
    outcome = world.outcome(novelty=UNFAMILIAR, predicted=None, path="unfamiliar")
    world.monitor.observe([outcome])
    world.clock.advance(PUBLISH_S)
    world.monitor.feedback(outcome.outcome_id, (QualitySignal("feedback", 1.0),))
    assert world.last.unfamiliar_answers["small"].answers == 1.0


def test_quality_on_unfamiliar_prompts_follows_a_change() -> None:
    quality = UnfamiliarQuality()
    assert quality.report() is None
    for score in [1.0] * 500 + [0.0] * 250:
        quality.add(score)
    report = quality.report()
    assert report is not None and report.quality < 0.1


def test_much_unfamiliar_traffic_raises_an_alarm_that_ends_with_it(world: World) -> None:
    for number in range(300):
        world.send(novelty=UNFAMILIAR if number % 20 == 0 else FAMILIAR)
    assert ("unfamiliar", "") not in world.alarms()
    assert world.monitor.unfamiliar_ratio() == pytest.approx(0.05)
    for number in range(300):
        world.send(novelty=UNFAMILIAR if number % 2 else FAMILIAR)
    assert ("unfamiliar", "") in world.alarms()
    for _ in range(600):
        world.send(novelty=FAMILIAR)
    assert ("unfamiliar", "") not in world.alarms()


def test_pinned_prompts_and_those_without_novelty_are_no_share_of_the_traffic(
    world: World,
) -> None:
    for _ in range(200):
        world.send(novelty=UNFAMILIAR, path="pinned")
        world.send()
    assert world.monitor.unfamiliar_ratio() is None


def test_a_new_predictor_starts_the_share_of_unfamiliar_prompts_anew(world: World) -> None:
    for _ in range(200):
        world.send(novelty=UNFAMILIAR)
    assert world.monitor.unfamiliar_ratio() == 1.0
    world.send(versions=Versions(PredictorVersion("refitted")), novelty=FAMILIAR)
    assert world.monitor.unfamiliar_ratio() is None
