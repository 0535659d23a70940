"""Endpoints for people: health, fleet, models, decisions, feedback."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from starlette.responses import Response

from calm_serve.errors import RequestError, UnknownModelError
from calm_serve.goals.controller import GoalController
from calm_serve.protocol.topics import PredictorStatus
from calm_serve.routing.selector import ModelSelector
from calm_serve.testing import (
    decision_for,
    make_context,
    make_fleet,
    make_goals,
    make_outcome,
    make_replica,
    make_spec,
)
from calm_serve.types import Outcome, QualitySignal
from deployments.router import fleet_view
from deployments.router.admin.operations import Operations
from deployments.router.admission import Admission
from deployments.router.fleet_view import FleetView
from deployments.router.live_state import LiveView
from deployments.wire import deployment_name

OUTCOMES = TypeAdapter(Outcome)
FLEET = make_fleet(
    make_spec("small", adapters=[{"name": "sql", "path": "x", "description": "SQL only"}]),
    make_spec("large", context_tokens=4096, description="Knows more."),
)


class Knowledge:
    """A knowledge client that keeps feedback and has one stored outcome."""

    reachable = True

    def __init__(self) -> None:
        self.signals: list[tuple[str, tuple[QualitySignal, ...]]] = []

    async def feedback(self, outcome_id: str, signals: tuple[QualitySignal, ...]) -> None:
        self.signals.append((outcome_id, signals))

    async def outcome(self, outcome_id: str) -> Outcome | None:
        return make_outcome("old") if outcome_id == "old" else None


class Subscriptions:
    predictor_source = "shipped"
    predictors: PredictorStatus | None = None


class Outbox:
    pending_rows = 3
    lost_rows = 2


class Bench:
    """Operations with everything they read."""

    def __init__(self) -> None:
        self.selector = ModelSelector(FLEET, make_goals(), controller=GoalController(make_goals()))
        self.knowledge, self.subscriptions = Knowledge(), Subscriptions()
        self.operations = Operations(
            self.selector,
            FleetView(FLEET, lambda: 0.0),
            cast(Any, self.knowledge),
            cast(Any, self.subscriptions),
            cast(Any, None),
            cast(Any, Outbox()),
            Admission(8, lambda: 0.0, lambda: 0.0),
        )


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> LiveView:
    view = LiveView(lambda: 0.0)
    monkeypatch.setattr(fleet_view, "VIEW", view)
    return view


@pytest.fixture
def bench(view: LiveView) -> Bench:
    return Bench()


def data(response: Response) -> Any:
    return json.loads(bytes(response.body))


async def test_health_is_503_with_the_states_until_every_hot_slm_has_been_up(
    bench: Bench, view: LiveView
) -> None:
    response = await bench.operations.health(cast(Any, None))
    assert response.status_code == 503
    assert data(response) == {
        "status": "starting",
        "slms": {"small": "pending", "large": "pending"},
    }
    for slm in FLEET.slms:
        view.update_replicas(deployment_name(slm.id), [make_replica()])
    response = await bench.operations.health(cast(Any, None))
    assert (response.status_code, data(response)["status"]) == (200, "ok")


async def test_the_fleet_document_names_the_predictor_and_every_slm(bench: Bench) -> None:
    document = data(await bench.operations.fleet(cast(Any, None)))
    at_first = {
        "version": "prior",
        "source": "shipped",
        "outcomes_pending": 3,
        "outcomes_lost": 2,
        "knowledge_reachable": True,
    }
    assert document["predictor"] == at_first
    bench.subscriptions.predictors = PredictorStatus(challenger="lgbm-2")
    document = data(await bench.operations.fleet(cast(Any, None)))
    assert document["predictor"] == {
        **at_first,
        "previous": "",
        "challenger": "lgbm-2",
        "pinned": "",
        "shadow": None,
        "post_promotion": None,
        "last_change": None,
    }
    assert [s["id"] for s in document["slms"]] == ["small", "large"]


async def test_models_are_auto_every_slm_and_every_adapter(bench: Bench) -> None:
    document = data(await bench.operations.models(cast(Any, None)))
    assert document["object"] == "list"
    by_id = {entry["id"]: entry for entry in document["data"]}
    assert list(by_id) == ["auto", "small", "small:sql", "large"]
    assert all(e["object"] == "model" and isinstance(e["created"], int) for e in by_id.values())
    assert by_id["large"]["max_model_len"] == 4096
    assert by_id["small:sql"]["parent"] == "small"
    assert by_id["small:sql"]["description"] == "SQL only"


def test_one_model_is_its_entry_of_the_list(bench: Bench) -> None:
    assert data(bench.operations.model("small:sql"))["id"] == "small:sql"
    with pytest.raises(UnknownModelError, match="'nobody' not found"):
        bench.operations.model("nobody")


async def test_a_recent_decision_comes_from_memory_and_an_old_one_from_the_store(
    bench: Bench,
) -> None:
    decision = decision_for(bench.selector, make_context(request_id="new"))
    bench.selector._log["new"] = decision
    assert data(await bench.operations.decision("new"))["slm_id"] == decision.slm_id
    old = data(await bench.operations.decision("old"))
    assert OUTCOMES.validate_python(old) == make_outcome("old")
    with pytest.raises(RequestError, match="'lost' not found") as caught:
        await bench.operations.decision("lost")
    assert caught.value.http_status == 404


@pytest.mark.parametrize(("score", "value"), [(1, 1.0), (0.25, 0.25), (True, 1.0), (False, 0.0)])
async def test_feedback_is_stored_as_a_quality_signal(
    bench: Bench, score: Any, value: float
) -> None:
    response = await bench.operations.feedback({"decision_id": "d", "score": score})
    assert data(response) == {"decision_id": "d", "accepted": True}
    ((outcome_id, (signal,)),) = bench.knowledge.signals
    assert (outcome_id, signal.source, signal.value) == ("d", "feedback", value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "object"),
        ({"score": 1}, "decision_id"),
        ({"decision_id": "", "score": 1}, "decision_id"),
        ({"decision_id": "x" * 65, "score": 1}, "decision_id"),
        ({"decision_id": 5, "score": 1}, "decision_id"),
        ({"decision_id": "d"}, "score"),
        ({"decision_id": "d", "score": "good"}, "score"),
        ({"decision_id": "d", "score": 1.01}, "score"),
        ({"decision_id": "d", "score": -1}, "score"),
        ({"decision_id": "d", "score": float("nan")}, "score"),
        ({"decision_id": "d", "score": 10**400}, "score"),
        ({"decision_id": "d", "score": 1, "note": "x"}, "unknown key 'note'"),
    ],
)
async def test_wrong_feedback_is_refused_and_not_stored(
    bench: Bench, body: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        await bench.operations.feedback(body)
    assert bench.knowledge.signals == []


SCORES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.dictionaries(st.sampled_from(["decision_id", "score"]), SCORES | st.just("d")) | SCORES)
async def test_any_json_as_feedback_is_stored_or_refused(body: Any) -> None:
    bench = Bench()
    try:
        await bench.operations.feedback(body)
    except RequestError:
        assert bench.knowledge.signals == []
    else:
        ((_, (signal,)),) = bench.knowledge.signals
        assert 0.0 <= signal.value <= 1.0
