"""Unfamiliar prompts: who gets them, what is recorded, and that the record replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest

from calm_serve.config import Fleet, Goals
from calm_serve.learning.decision_log import decision_terms, read_decision, redecide, rescore
from calm_serve.requests import Overrides, parse_chat
from calm_serve.routing import ModelSelector
from calm_serve.routing.selector import assume_hot
from calm_serve.testing import (
    decision_for,
    make_fleet,
    make_goals,
    make_outcome,
    make_prediction,
    make_spec,
    make_state,
)
from calm_serve.types import (
    Decision,
    DecisionPath,
    DecisionReason,
    Novelty,
    Prediction,
    PredictorVersion,
    Residency,
    RoutingContext,
    SLMState,
)

NARROW = (
    make_spec("sql", validator="sql", priors={"quality": 0.05, "skill_quality": 0.9}),
    make_spec("shell"),
    make_spec("intent", validator="json"),
)
RULES = [{"name": "names-shell", "marker": "shell", "slms": ["shell"]}]
CHAT = make_spec("chat", priors={"quality": 0.4}, skills=["poem"])


def fleet_of(*generalists: Any, **fields: Any) -> Fleet:
    markers = {"shell": r"\bbash\b", "poem": r"\bpoem\b"}
    return make_fleet(*NARROW, *generalists, markers=markers, rules=RULES, **fields)


class Believer:
    """A predictor that trusts `sql` with everything, and finds every prompt equally novel."""

    version = PredictorVersion("believer")

    def __init__(self, novelty: float | None = 0.6) -> None:
        self._novelty = novelty

    def predict(self, context: RoutingContext, specs: Any, states: Any) -> list[Prediction]:
        success = {"sql": 0.95, "shell": 0.6}
        return [make_prediction(s.id, success_ratio=success.get(s.id, 0.3)) for s in specs]

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        return None if self._novelty is None or not bits else Novelty(self._novelty, 0.4)

    def of_prompt(
        self, numbers: Sequence[float], buckets: Sequence[int]
    ) -> dict[str, tuple[float | None, float | None]]:
        return {}


def select(
    fleet: Fleet,
    novelty: float | None = 0.6,
    states: Mapping[str, SLMState] | None = None,
    goals: Goals | None = None,
) -> ModelSelector:
    known = states or {}
    return ModelSelector(
        fleet,
        goals or make_goals(),
        read_state=lambda spec: known.get(spec.id, assume_hot(spec)),
        predictor=Believer(novelty),
    )


def decide(target: ModelSelector, text: str = "who wrote hamlet", **headers: Any) -> Decision:
    request = parse_chat({"messages": [{"role": "user", "content": text}]})
    return target.decide(request, Overrides(**headers), "decision")


def test_a_chat_model_added_by_metadata_alone_gets_unfamiliar_prompts_at_once() -> None:
    decision = decide(select(fleet_of(CHAT)))
    assert (decision.slm_id, decision.path) == ("chat", DecisionPath.UNFAMILIAR)
    assert decision.reason is DecisionReason.UNFAMILIAR
    assert decision.novelty == Novelty(0.6, 0.4)
    assert decision.ranking == ("chat", "sql", "shell", "intent")


@pytest.mark.parametrize("novelty", [None, 0.3, 0.1])
def test_familiar_prompts_go_by_the_score(novelty: float | None) -> None:
    decision = decide(select(fleet_of(CHAT), novelty))
    assert (decision.slm_id, decision.reason) == ("sql", DecisionReason.BEST_SCORE)


def test_a_specialist_gets_an_unfamiliar_prompt_by_a_rule() -> None:
    target = select(fleet_of(CHAT))
    decision = decide(target, "write a bash line")
    assert (decision.slm_id, decision.path) == ("shell", DecisionPath.RULE)


def test_a_rules_decision_gets_its_novelty_with_its_features() -> None:
    target = select(fleet_of(CHAT))
    request = parse_chat({"messages": [{"role": "user", "content": "write a bash line"}]})
    decision = target.decide(request, Overrides(), "decision")
    assert decision.novelty is None
    target.complete(decision, request)
    assert decision.novelty == Novelty(0.6, 0.4)


def test_novelty_of_another_predictor_is_not_added_later() -> None:
    target = select(fleet_of(CHAT))
    request = parse_chat({"messages": [{"role": "user", "content": "write a bash line"}]})
    decision = target.decide(request, Overrides(), "decision")
    target.predictor = Believer()
    target.predictor.version = PredictorVersion("another")
    target.complete(decision, request)
    assert decision.novelty is None and decision.context.features.bits


def test_the_default_generality_is_that_of_a_chat_model_without_rule_and_validator() -> None:
    embed = make_spec("embed", task="embed")
    base = make_spec("base", capabilities={"chat": False})
    stated = make_spec("stated", validator="json", generality=0.7)
    fleet = fleet_of(CHAT, embed, base, stated)
    found = {spec.id: fleet.generality(spec) for spec in fleet.slms}
    assert found == {
        **dict.fromkeys(("sql", "shell", "intent", "embed", "base"), 0.0),
        "chat": 1.0,
        "stated": 0.7,
    }


def test_generality_goes_before_quality() -> None:
    weak = make_spec("weak", generality=1.0, priors={"quality": 0.1})
    strong = make_spec("strong", generality=0.6, priors={"quality": 0.9})
    assert decide(select(fleet_of(strong, weak))).ranking[:2] == ("weak", "strong")


def test_measured_quality_on_unfamiliar_prompts_goes_before_the_prior() -> None:
    other = make_spec("other", priors={"quality": 0.3})
    measured = {"other": make_state("other", unfamiliar_answers=20.0, unfamiliar_quality=0.8)}
    fleet = fleet_of(CHAT, other)
    assert decide(select(fleet)).slm_id == "chat"
    assert decide(select(fleet, states=measured)).slm_id == "other"
    one = {"other": make_state("other", unfamiliar_answers=1.0, unfamiliar_quality=0.6)}
    assert decide(select(fleet, states=one)).slm_id == "chat"


def test_a_declared_skill_raises_the_prior() -> None:
    other = make_spec("other", priors={"quality": 0.5})
    target = select(fleet_of(CHAT, other))
    assert decide(target).slm_id == "other"
    assert decide(target, "a poem").slm_id == "chat"


def test_a_generalist_below_the_floor_comes_after_the_others() -> None:
    first = make_spec("first", generality=1.0, priors={"quality": 0.2})
    second = make_spec("second", generality=0.8, priors={"quality": 0.7})
    target = select(fleet_of(first, second))
    assert decide(target).slm_id == "first"
    assert decide(target, quality_floor=0.5).slm_id == "second"
    assert decide(target, quality_floor=0.9).slm_id == "first"


def test_a_generalist_that_will_miss_the_slo_comes_after_the_others() -> None:
    class Slow(Believer):
        def predict(self, context: RoutingContext, specs: Any, states: Any) -> list[Prediction]:
            found = super().predict(context, specs, states)
            return [replace(p, ttft_s=9.0) if p.slm_id == "chat" else p for p in found]

    second = make_spec("second", generality=0.8)
    target = select(fleet_of(CHAT, second))
    target.predictor = Slow()
    assert decide(target).slm_id == "chat"
    late = decide(target, deadline_s=2.0)
    assert (late.slm_id, late.preferred) == ("second", "chat")
    alone = select(fleet_of(CHAT))
    alone.predictor = Slow()
    assert decide(alone, deadline_s=2.0).slm_id == "chat"


def test_without_a_generalist_the_operators_default_answers() -> None:
    decision = decide(select(fleet_of(), goals=make_goals(default_slm="shell")))
    assert (decision.slm_id, decision.reason) == ("shell", DecisionReason.UNFAMILIAR)
    assert decision.path is DecisionPath.UNFAMILIAR


def test_without_a_generalist_and_a_default_the_score_decides_and_says_so() -> None:
    decision = decide(select(fleet_of()))
    assert (decision.slm_id, decision.path) == ("sql", DecisionPath.SCORED)
    assert decision.reason is DecisionReason.UNFAMILIAR_NO_GENERALIST


def test_a_default_that_cannot_answer_leaves_it_to_the_score() -> None:
    down = {"shell": make_state("shell", breaker_open=True)}
    goals = make_goals(default_slm="shell")
    assert decide(select(fleet_of(), states=down, goals=goals)).slm_id == "sql"


def test_a_generalist_that_is_down_leaves_it_to_the_others() -> None:
    down = {"chat": make_state("chat", replicas=0, residency=Residency.DEAD)}
    second = make_spec("second", generality=0.6)
    assert decide(select(fleet_of(CHAT, second), states=down)).slm_id == "second"


def test_exploration_of_unfamiliar_prompts_stays_among_generalists() -> None:
    target = select(
        fleet_of(CHAT, make_spec("second", generality=0.6)), goals=make_goals(exploration_ratio=0.5)
    )
    context = decide(target).context
    decisions = [decision_for(target, replace(context, request_id=f"r{i}")) for i in range(300)]
    propensities = {d.slm_id: d.propensity for d in decisions}
    assert propensities == {"chat": 0.5, "second": 0.5}
    explored = {d.slm_id for d in decisions if d.reason is DecisionReason.EXPLORATION}
    assert explored == {"second"}
    assert {d.path for d in decisions} == {DecisionPath.UNFAMILIAR}


@pytest.mark.parametrize("generalists", [(), (CHAT, make_spec("second", generality=0.6))])
@pytest.mark.parametrize("default_slm", ["", "shell"])
def test_a_logged_unfamiliar_decision_replays_to_itself(
    generalists: tuple[Any, ...], default_slm: str
) -> None:
    goals = make_goals(exploration_ratio=0.5, default_slm=default_slm)
    target = select(fleet_of(*generalists), goals=goals)
    context = decide(target).context
    for number in range(40):
        decision = decision_for(target, replace(context, request_id=f"r{number}"))
        outcome = make_outcome(
            decision.decision_id,
            slm_id=decision.slm_id,
            path=str(decision.path),
            novelty=decision.novelty,
            numbers=context.features.numbers,
            bits=context.features.bits,
            terms=decision_terms(decision),
        )
        logged = read_decision(outcome)
        assert logged is not None
        again = redecide(
            logged,
            rescore(logged),
            exploration_ratio=goals.exploration_ratio,
            default_slm=default_slm,
        )
        assert again == decision.slm_id
        assert decision_for(target, decision.context) == decision


def test_another_predictor_says_for_itself_what_is_unfamiliar() -> None:
    target = select(fleet_of(CHAT))
    decision = decide(target)
    outcome = make_outcome(
        slm_id="chat",
        path=str(decision.path),
        novelty=decision.novelty,
        numbers=decision.context.features.numbers,
        bits=decision.context.features.bits,
        terms=decision_terms(decision),
    )
    logged = read_decision(outcome)
    assert logged is not None
    ranked = rescore(logged)
    assert redecide(logged, ranked) == "chat"
    assert redecide(logged, ranked, predictor=Believer(novelty=0.1)) == "sql"
    assert redecide(logged, ranked, predictor=Believer(novelty=0.9)) == "chat"


def test_the_explanation_shows_novelty_threshold_and_what_decided() -> None:
    target = select(fleet_of(CHAT))
    explained = target.explain(decide(target))
    assert explained["novelty"] == {"ratio": 0.6, "threshold": 0.4}
    general = {c["slm_id"]: c["general"] for c in explained["candidates"]}
    assert general["chat"] == {"generality": 1.0, "quality": 0.4}
    assert general["sql"] == {"generality": 0.0, "quality": 0.05}
    assert asdict(decide(target))["novelty"] == explained["novelty"]
