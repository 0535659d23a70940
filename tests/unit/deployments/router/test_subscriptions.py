"""What the knowledge actor publishes, applied to a router: each topic reaches its place."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from calm_serve.config import Goals, ResidencyOptions, SLMSpec
from calm_serve.goals.controller import GoalController
from calm_serve.learning.training import train
from calm_serve.prediction import Artifact
from calm_serve.prediction.cold_start import LABELLED
from calm_serve.protocol.reports import ReplicaReport
from calm_serve.protocol.topics import (
    FORMATS,
    Alarm,
    DesiredResidency,
    GoalChange,
    MonitorFindings,
    PredictorStatus,
    PublishedPredictor,
    RegisteredSLM,
    SLMEnergy,
    Topic,
    Update,
)
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import make_fleet, make_goals, make_outcome, make_spec
from calm_serve.types import LoadAtDecision, Outcome, PredictorVersion, Residency, Versions
from deployments.router import fleet_view
from deployments.router.fleet_view import FleetView
from deployments.router.live_state import LiveView
from deployments.router.subscriptions import PRIOR_SOURCE, Subscriptions
from tests.knowledge_data import CODER, TALKER, make_world

FLEET = make_fleet()
ARTIFACT = train(
    make_world(200), (CODER, TALKER), seed=0, holdout_ratio=0.25, clock=lambda: 0.0
).artifact
COLD_START = replace(ARTIFACT, version="new-1", metrics={LABELLED: {CODER: 0.0, TALKER: 0.0}})


class Handles:
    """Keeps which SLMs run in applications of their own."""

    added: Mapping[str, str] = {}

    def set_added(self, apps: Mapping[str, str]) -> None:
        self.added = apps


class Router:
    """What subscriptions write to."""

    def __init__(self) -> None:
        self.selector = ModelSelector(FLEET, make_goals(), controller=GoalController(make_goals()))
        self.view = FleetView(FLEET, lambda: 0.0)
        self.handles = Handles()
        self.subscriptions = Subscriptions(FLEET, self.selector, self.view, cast(Any, self.handles))

    async def publish(self, topic: Topic, record: Any, revision: int = 1) -> None:
        await self.subscriptions.apply(topic, Update(revision, FORMATS[topic].encode(record)))


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setattr(fleet_view, "VIEW", LiveView(lambda: 0.0))
    return Router()


def published(artifact: Artifact, source: str = "trained") -> PublishedPredictor:
    return PublishedPredictor(artifact.version, source, artifact.to_bytes())


async def test_a_champion_decides(router: Router) -> None:
    assert router.subscriptions.predictor_source == PRIOR_SOURCE
    await router.publish(Topic.PREDICTOR, published(ARTIFACT))
    assert router.selector.predictor.version == PredictorVersion(ARTIFACT.version)
    assert router.subscriptions.predictor_source == "trained"


async def test_decisions_name_a_champion_that_came_with_the_fleet(router: Router) -> None:
    await router.publish(Topic.PREDICTOR, published(ARTIFACT, "shipped"))
    version = PredictorVersion(ARTIFACT.version, shipped=True)
    assert router.selector.versions.predictor == version
    assert str(version) == f"{ARTIFACT.version}+shipped"


async def test_cold_start_boosters_join_the_champion_in_either_order(router: Router) -> None:
    await router.publish(Topic.COLD_START, published(COLD_START, "cold_start"))
    assert router.selector.predictor.version == PredictorVersion("prior")
    await router.publish(Topic.PREDICTOR, published(ARTIFACT))
    both = PredictorVersion(ARTIFACT.version, "new-1")
    assert router.selector.predictor.version == both
    await router.publish(Topic.COLD_START, None)
    assert router.selector.predictor.version == PredictorVersion(ARTIFACT.version)
    await router.publish(Topic.COLD_START, published(COLD_START, "cold_start"))
    assert router.selector.predictor.version == both
    assert router.subscriptions.predictor_source == "trained"


async def test_a_refit_cold_start_booster_keeps_what_was_learned_of_the_champion(
    router: Router,
) -> None:
    (spec,) = (s for s in FLEET.slms if s.id == "small")
    await router.publish(Topic.PREDICTOR, published(ARTIFACT))
    for _ in range(20):
        router.view.observe(slow_answer(ARTIFACT.version))
    learned = router.view.state(spec).ttft_ratio
    assert learned > 2.0
    await router.publish(Topic.COLD_START, published(COLD_START, "cold_start"))
    assert router.view.state(spec).ttft_ratio == learned
    await router.publish(Topic.PREDICTOR, published(replace(ARTIFACT, version="next")))
    router.view.observe(slow_answer(ARTIFACT.version))  # its stream began before
    assert router.view.state(spec).ttft_ratio == 1.0


def slow_answer(champion: str) -> Outcome:
    return make_outcome(
        ttft_s=0.2,  # four times the prediction
        load=LoadAtDecision(1.0, 1, 1.0),
        versions=Versions(PredictorVersion(champion)),
    )


async def test_a_predictor_that_cannot_be_read_leaves_the_present_one(
    router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    await router.publish(Topic.PREDICTOR, published(ARTIFACT))
    present = router.selector.predictor
    with caplog.at_level(logging.ERROR):
        await router.publish(Topic.PREDICTOR, PublishedPredictor("v2", "trained", b"half a fi"))
    assert router.selector.predictor is present
    assert "refused" in caplog.text


async def test_a_challenger_predicts_in_the_shadow_and_decides_nothing(router: Router) -> None:
    shadow = router.subscriptions.shadow
    await router.publish(Topic.CHALLENGER, published(ARTIFACT))
    assert shadow.challenger is not None
    assert shadow.challenger.version.champion == ARTIFACT.version
    assert router.selector.predictor.version == PredictorVersion("prior")
    await router.publish(Topic.CHALLENGER, None)
    assert shadow.challenger is None


async def test_the_stored_predictors_are_shown(router: Router) -> None:
    assert router.subscriptions.predictors is None
    status = PredictorStatus(previous="v1", challenger="v2")
    await router.publish(Topic.PREDICTORS, status)
    assert router.subscriptions.predictors == status


async def test_reports_of_replicas_reach_the_view(router: Router) -> None:
    await router.publish(Topic.REPLICAS, {"small": {"r1": ReplicaReport("warming up", at=1.0)}})
    assert router.view.states()["small"] == "warming up"


async def test_desired_residency_reaches_the_view_with_its_revision(router: Router) -> None:
    options = ResidencyOptions(memory_budget_bytes=1 << 30, hold_s=20.0)
    desired = DesiredResidency({"small": Residency.ASLEEP}, options)
    await router.publish(Topic.RESIDENCY, desired, revision=41)
    residency = router.view.residency
    assert residency.desired() == {"small": "asleep"}
    assert (residency.revision, residency.options) == (41, options)


async def test_findings_of_the_monitor_reach_the_view(router: Router) -> None:
    alarm = Alarm("quality", "small", size=0.4, since=5.0, detail="fewer", replica="r1")
    await router.publish(Topic.MONITOR, MonitorFindings({"small": 0.4}, 0.03, (alarm,)))
    document = router.view.snapshot({})
    assert [a["detail"] for a in document["alarms"]] == ["fewer"]
    assert document["choices"]["calibration_error"] == 0.03
    assert router.view.state(FLEET.slms[0]).calibration_factor == 0.4


async def test_energy_reaches_the_view(router: Router) -> None:
    energy = SLMEnergy(5.0, 1.0, 6.0, "counter", False, 0.01, at=1.0)
    await router.publish(Topic.ENERGY, {"small": energy})
    rows = {row["id"]: row["energy"] for row in router.view.snapshot({})["slms"]}
    assert (rows["small"]["total_j"], rows["large"]) == (6.0, {})


def registered(*specs: SLMSpec) -> dict[str, RegisteredSLM]:
    return {s.id: RegisteredSLM(s.model_dump(mode="json"), f"app-{s.id}") for s in specs}


async def test_slms_of_other_applications_join_and_leave_the_fleet(router: Router) -> None:
    spec = make_spec("later", skills=["sql"])
    await router.publish(Topic.SLMS, registered(spec))
    assert router.selector.fleet.slms == (*FLEET.slms, spec)
    assert router.view.fleet == router.selector.fleet
    assert router.handles.added == {"later": "app-later"}
    await router.publish(Topic.SLMS, {})
    assert router.selector.fleet == FLEET
    assert router.handles.added == {}


async def test_an_slm_with_a_taken_id_or_an_unreadable_entry_costs_no_other(
    router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    odd = RegisteredSLM({"id": "odd", "gone_field": 1}, "app-odd")
    entries = registered(make_spec("small"), make_spec("later")) | {"odd": odd}
    with caplog.at_level(logging.ERROR):
        await router.publish(Topic.SLMS, entries)
    assert [s.id for s in router.selector.fleet.slms] == ["small", "large", "later"]
    assert router.handles.added == {"later": "app-later"}
    assert "'small'" in caplog.text
    assert "'odd'" in caplog.text


def change(revision: int, **goals: Any) -> GoalChange:
    return GoalChange(1.0, "ann", None, goals, revision)


async def test_published_goals_replace_the_configured_ones(router: Router) -> None:
    await router.publish(Topic.GOALS, change(1, ttft_p95_s=2.0))
    assert router.selector.goals == Goals(ttft_p95_s=2.0)
    assert router.subscriptions.goals_change == change(1, ttft_p95_s=2.0)


async def test_the_same_goals_again_leave_the_weights_where_they_are(router: Router) -> None:
    await router.publish(Topic.GOALS, change(1, ttft_p95_s=2.0))
    before = router.selector.goals
    await router.publish(Topic.GOALS, change(2, ttft_p95_s=2.0))
    assert router.selector.goals is before
    assert router.subscriptions.goals_change == change(2, ttft_p95_s=2.0)


@pytest.mark.parametrize("goals", [{"gone_field": 2.0}, {"ttft_p95_s": -1.0}])
async def test_published_goals_that_make_no_sense_are_refused(
    router: Router, goals: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = router.selector.goals
    with caplog.at_level(logging.ERROR):
        await router.publish(Topic.GOALS, change(1, **goals))
    assert router.selector.goals is before
    assert router.subscriptions.goals_change is None
    assert "published goals refused" in caplog.text


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_wait_for_goals_ends_with_their_revision_or_a_later_one(router: Router) -> None:
    wait = router.subscriptions.wait_for_goals
    waiting = asyncio.create_task(wait(7, 60.0))
    await turns()
    await router.publish(Topic.GOALS, change(6, ttft_p95_s=1.0))
    await turns()
    assert not waiting.done()
    await router.publish(Topic.GOALS, change(8, ttft_p95_s=2.0))
    assert await waiting
    assert await wait(7, 0.0)
    assert not await wait(9, 0.001)


RECORDS: dict[Topic, Any] = {
    Topic.PREDICTOR: published(ARTIFACT),
    Topic.CHALLENGER: published(ARTIFACT),
    Topic.COLD_START: published(COLD_START, "cold_start"),
    Topic.PREDICTORS: PredictorStatus(previous="v1"),
    Topic.REPLICAS: {"small": {"r1": ReplicaReport("failed", at=1.0)}},
    Topic.SLMS: registered(make_spec("later")),
    Topic.GOALS: change(1, ttft_p95_s=2.0),
    Topic.RESIDENCY: DesiredResidency({"small": Residency.ASLEEP}),
    Topic.MONITOR: MonitorFindings({"small": 0.4}, 0.03),
    Topic.ENERGY: {"small": SLMEnergy(5.0, 1.0, 6.0, "counter", False, 0.01, at=1.0)},
}


def snapshot(router: Router) -> Any:
    """Everything that a topic may change."""
    subscriptions, selector = router.subscriptions, router.selector
    return (
        selector.predictor,
        selector.goals,
        selector.fleet,
        subscriptions.predictor_source,
        subscriptions.predictors,
        subscriptions.goals_change,
        subscriptions.shadow.challenger,
        router.view.snapshot({}),
        router.view.residency.revision,
        dict(router.handles.added),
    )


@pytest.mark.parametrize("topic", Topic)
@pytest.mark.parametrize("change", [{"version": 2}, {"format": "other"}, {"record": 5}])
async def test_an_update_that_cannot_be_read_changes_nothing_and_is_logged(
    router: Router, topic: Topic, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads(FORMATS[topic].encode(RECORDS[topic])) | change
    before = snapshot(router)
    with caplog.at_level(logging.ERROR):
        await router.subscriptions.apply(topic, Update(9, json.dumps(document).encode()))
    assert snapshot(router) == before
    assert f"update of {topic} refused" in caplog.text
    if "version" in change:
        assert "version 2 was written by a newer program" in caplog.text
        assert "up to 1" in caplog.text
    # The refused record is not kept for a later update of another topic either.
    await router.publish(topic, RECORDS[topic])
    assert snapshot(router) != before or topic is Topic.COLD_START


async def test_an_unknown_topic_changes_nothing_and_is_logged(
    router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    before = snapshot(router)
    with caplog.at_level(logging.ERROR):
        await router.subscriptions.apply("weather", Update(9, b"{}"))
    assert snapshot(router) == before
    assert "weather" in caplog.text
