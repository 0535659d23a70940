"""The decision: every path and reason, its record, and that a record replays to itself."""

from __future__ import annotations

import gc
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest

from calm_serve.config import Fleet
from calm_serve.errors import (
    ContextLengthError,
    NoCandidateError,
    SLMUnavailableError,
    UnknownModelError,
)
from calm_serve.learning import decision_terms
from calm_serve.learning.decision_log import read_decision, redecide, rescore
from calm_serve.requests import Overrides, fill_features, parse_chat
from calm_serve.requests.features import NUMBER_NAMES
from calm_serve.routing.selector import ModelSelector, assume_hot
from calm_serve.testing import (
    FakeClock,
    decision_for,
    make_context,
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
    Residency,
    RoutingContext,
    SLMState,
)

FLEET = make_fleet(
    make_spec("sql", skills=["sql"], adapters=[{"name": "strict", "path": "x"}]),
    make_spec("chat", priors={"quality": 0.6}),
    make_spec("guard", priors={"quality": 0.1}),
    make_spec(
        "cloud",
        locality="remote",
        remote={"base_url": "http://x/v1"},
        priors={"quality": 0.5, "ttft_s": 1.0},
    ),
    markers={"sql": "select", "mixed": "either"},
    rules=[
        {"name": "sql-first", "marker": "sql", "slms": ["sql"]},
        {"name": "either", "marker": "mixed", "slms": ["sql", "guard"]},
    ],
    safety=[{"name": "secret", "pattern": "password", "slm": "guard"}],
)


class Oracle:
    """A predictor with fixed answers."""

    version = "oracle-1"

    def __init__(self, novelty: float | None = None, **success: float) -> None:
        self._success, self._novelty = success, novelty

    def predict(self, context: RoutingContext, specs: Any, states: Any) -> list[Prediction]:
        return [make_prediction(s.id, success_ratio=self._success.get(s.id, 0.5)) for s in specs]

    def novelty(self, bits: Sequence[int]) -> Novelty | None:
        return None if self._novelty is None else Novelty(self._novelty, 0.3)


def make_selector(
    fleet: Fleet = FLEET, states: Mapping[str, SLMState] | None = None, **kw: Any
) -> ModelSelector:
    known = states or {}
    goals = kw.pop("goals", make_goals())
    return ModelSelector(
        fleet, goals, read_state=lambda spec: known.get(spec.id, assume_hot(spec)), **kw
    )


def decide(
    target: ModelSelector,
    text: str = "good morning",
    headers: Overrides | None = None,
    **fields: Any,
) -> Decision:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return target.decide(parse_chat(body), headers or Overrides(), "decision")


def label(decision: Decision) -> tuple[str, str, str, str]:
    return decision.slm_id, decision.path, decision.reason, decision.rule


def test_a_named_slm_is_pinned() -> None:
    decision = decide(make_selector(), model="guard")
    assert label(decision) == ("guard", DecisionPath.PINNED, DecisionReason.REQUESTED, "")
    assert decision.ranking == ("guard",)
    assert decision.propensity == 1.0
    assert decision.candidates[0].prediction is not None


def test_a_named_adapter_is_pinned_to_its_slm() -> None:
    decision = decide(make_selector(), model="sql:strict")
    assert (decision.slm_id, decision.adapter) == ("sql", "strict")


@pytest.mark.parametrize(
    "model", ["nobody", "nobody:strict", "auto:strict", "sql:loose", ":strict"]
)
def test_an_unknown_model_is_refused_with_the_known_ones(model: str) -> None:
    with pytest.raises(UnknownModelError, match=r"known: auto, .*chat.*sql:strict") as caught:
        decide(make_selector(), model=model)
    assert (caught.value.http_status, caught.value.param) == (404, "model")


def test_a_safety_pattern_pins_whatever_the_client_names() -> None:
    for fields in ({}, {"model": "chat"}, {"model": "sql:strict"}, {"model": "nobody"}):
        decision = decide(make_selector(), "my password: select", **fields)
        assert label(decision) == (
            "guard",
            DecisionPath.PINNED,
            DecisionReason.SAFETY_PIN,
            "secret",
        )
        assert decision.adapter == ""
        assert decision.context.local_only


def test_a_pinned_slm_without_a_replica_is_unavailable() -> None:
    gone = {"chat": make_state("chat", replicas=0, residency=Residency.DEAD)}
    with pytest.raises(SLMUnavailableError, match="'chat'"):
        decide(make_selector(states=gone), model="chat")


def test_a_pinned_slm_is_held_to_what_can_work() -> None:
    with pytest.raises(NoCandidateError, match="'chat' cannot take this request: no_tools"):
        decide(make_selector(), model="chat", tools=[{"type": "function"}])
    with pytest.raises(NoCandidateError, match="data_policy"):
        decide(make_selector(), headers=Overrides(local_only=True), model="cloud")


@pytest.mark.parametrize("model", ["chat", "auto"])
def test_a_request_beyond_every_context_is_the_error_that_clients_know(model: str) -> None:
    text = "word " * 20_000
    with pytest.raises(ContextLengthError, match=r"'?chat'?.*context_length") as caught:
        decide(make_selector(), text, model=model)
    limit = max(s.context_tokens for s in FLEET.slms)
    assert caught.value.message.startswith(f"This model's maximum context length is {limit} tokens")
    asked = re.search(r"you requested (\d+) tokens", caught.value.message)
    assert asked is not None and int(asked[1]) > limit
    assert caught.value.to_openai()["error"]["code"] == "context_length_exceeded"
    assert "prompt is too long" in caught.value.to_anthropic()["error"]["message"]


def test_an_answer_longer_than_the_context_is_that_error_too() -> None:
    with pytest.raises(ContextLengthError):
        decide(make_selector(), model="chat", max_tokens=100_000)


def test_what_a_shorter_request_would_not_cure_is_another_error() -> None:
    with pytest.raises(NoCandidateError) as caught:
        decide(make_selector(), "word " * 20_000, tools=[{"type": "function"}])
    assert caught.value.code == "no_capable_model"


def test_a_pinned_slm_answers_although_its_breaker_is_open() -> None:
    struggling = {"chat": make_state("chat", breaker_open=True)}
    assert decide(make_selector(states=struggling), model="chat").slm_id == "chat"


def test_a_rule_with_one_slm_decides_without_scoring() -> None:
    decision = decide(make_selector(), "select * from t")
    assert label(decision) == ("sql", DecisionPath.RULE, DecisionReason.RULE_MATCH, "sql-first")
    assert decision.ranking == ("sql",)
    assert [c.slm_id for c in decision.candidates] == ["sql"]


def test_a_rule_keeps_every_other_candidate_for_failover_by_score() -> None:
    target = make_selector(predictor=Oracle(sql=0.1, guard=0.9, chat=0.3, cloud=0.6))
    decision = decide(target, "select * from t")
    assert decision.slm_id == "sql"
    assert decision.unscored == ("chat", "guard", "cloud")
    request = parse_chat({"messages": [{"role": "user", "content": "select * from t"}]})
    assert target.rank_unscored(decision, request) == ("guard", "cloud", "chat")
    assert decide(target).unscored == ()


def test_failover_of_a_rule_follows_the_states_and_the_fleet_of_now() -> None:
    states: dict[str, SLMState] = {}
    target = ModelSelector(
        FLEET,
        make_goals(latency_weight_per_s=1.0),
        read_state=lambda spec: states.get(spec.id, assume_hot(spec)),
    )
    decision = decide(target, "select * from t")
    fill_features(decision.context, parse_chat({"messages": [{"role": "user", "content": "x"}]}))
    assert target.rank_unscored(decision)[0] == "chat"
    states["chat"] = make_state("chat", ttft_ratio=100.0)
    assert target.rank_unscored(decision)[-1] == "chat"
    target.set_fleet(make_fleet(*[s for s in FLEET.slms if s.id != "chat"]))
    assert set(target.rank_unscored(decision)) == {"guard", "cloud"}


def test_failover_of_a_rule_stays_above_the_quality_floor() -> None:
    target = make_selector(predictor=Oracle(sql=0.8, guard=0.9, chat=0.3, cloud=0.6))
    decision = decide(target, "select * from t", Overrides(quality_floor=0.5))
    assert decision.unscored == ("chat", "guard", "cloud")
    assert target.rank_unscored(decision) == ("guard", "cloud")


def test_a_rule_has_no_say_when_its_slm_is_below_the_quality_floor() -> None:
    oracle = Oracle(sql=0.4, guard=0.9)
    asked = decide(make_selector(predictor=oracle), "select 1", Overrides(quality_floor=0.5))
    goals = make_goals(quality_floor=0.5)
    configured = decide(make_selector(predictor=oracle, goals=goals), "select 1")
    for decision in (asked, configured):
        assert label(decision)[:2] == ("guard", DecisionPath.SCORED)
        assert decision.rule == ""
        assert len(decision.candidates) == 4


def test_a_rule_whose_slm_reaches_the_quality_floor_still_decides() -> None:
    target = make_selector(predictor=Oracle(sql=0.6, guard=0.9))
    decision = decide(target, "select 1", Overrides(quality_floor=0.5))
    assert label(decision) == ("sql", DecisionPath.RULE, DecisionReason.RULE_MATCH, "sql-first")
    assert decision.candidates[0].quality == 0.6


def test_a_short_list_loses_those_below_the_quality_floor() -> None:
    target = make_selector(predictor=Oracle(sql=0.4, guard=0.7, chat=0.99))
    decision = decide(target, "either one", Overrides(quality_floor=0.5))
    assert (decision.slm_id, decision.ranking, decision.rule) == ("guard", ("guard",), "either")
    none = decide(target, "either one", Overrides(quality_floor=0.9))
    assert (none.slm_id, none.rule) == ("chat", "")


def test_features_that_a_rule_did_not_read_are_added_to_its_record() -> None:
    target = make_selector()
    request = parse_chat({"messages": [{"role": "user", "content": "select 12 of them"}]})
    decision = target.decide(request, Overrides(), "decision")
    assert (decision.path, decision.context.features.numbers) == (DecisionPath.RULE, ())
    fill_features(decision.context, request)
    recalled = target.recall("decision")
    assert recalled is not None
    assert len(recalled.context.features.numbers) == len(NUMBER_NAMES)
    assert recalled.context.features.buckets
    scored = decide(target, "12 of them").context
    fill_features(recalled.context, request)
    assert scored.features.numbers != recalled.context.features.numbers


def test_a_rule_with_several_slms_makes_a_short_list() -> None:
    decision = decide(make_selector(predictor=Oracle(sql=0.4, guard=0.7, chat=0.99)), "either one")
    assert label(decision) == (
        "guard",
        DecisionPath.SCORED,
        DecisionReason.BEST_SCORE,
        "either",
    )
    assert decision.ranking == ("guard", "sql")
    assert decision.unscored == ("chat", "cloud")


def test_a_rule_whose_slms_are_all_excluded_has_no_say() -> None:
    open_breaker = {"sql": make_state("sql", breaker_open=True)}
    decision = decide(make_selector(states=open_breaker), "select * from t")
    assert label(decision) == ("chat", DecisionPath.PRIOR, DecisionReason.BEST_PRIOR, "")
    assert [c.excluded_by for c in decision.candidates if c.slm_id == "sql"] == ["breaker"]


def test_a_short_list_shrunk_to_one_is_the_rules_choice() -> None:
    open_breaker = {"sql": make_state("sql", breaker_open=True)}
    decision = decide(make_selector(states=open_breaker), "either one")
    assert label(decision) == ("guard", DecisionPath.RULE, DecisionReason.RULE_MATCH, "either")


def test_without_a_predictor_the_priors_decide() -> None:
    decision = decide(make_selector())
    assert label(decision) == ("chat", DecisionPath.PRIOR, DecisionReason.BEST_PRIOR, "")
    assert str(decision.versions.predictor) == "prior"


def test_with_a_predictor_the_best_score_wins_and_the_rest_is_the_fallback_order() -> None:
    decision = decide(make_selector(predictor=Oracle(guard=0.9, sql=0.7, cloud=0.6, chat=0.3)))
    assert label(decision) == ("guard", DecisionPath.SCORED, DecisionReason.BEST_SCORE, "")
    assert decision.ranking == ("guard", "sql", "cloud", "chat")
    assert str(decision.versions.predictor) == "oracle-1"


def test_no_excluded_slm_is_ever_in_the_fallback_order() -> None:
    decision = decide(make_selector(), headers=Overrides(local_only=True))
    assert "cloud" not in decision.ranking
    excluded = {c.slm_id: c.excluded_by for c in decision.candidates if c.excluded_by}
    assert excluded == {"cloud": "data_policy"}


def test_no_slm_below_the_quality_floor_is_in_the_fallback_order() -> None:
    oracle = Oracle(guard=0.9, sql=0.7, cloud=0.6, chat=0.3)
    asked = decide(make_selector(predictor=oracle), headers=Overrides(quality_floor=0.65))
    configured = decide(make_selector(predictor=oracle, goals=make_goals(quality_floor=0.65)))
    assert asked.ranking == configured.ranking == ("guard", "sql")


BILINGUAL = make_fleet(
    make_spec("english", priors={"quality": 0.9}),
    make_spec("any", languages=[], priors={"quality": 0.5}),
)


@pytest.mark.parametrize(
    ("language", "ratio", "winner", "excluded"),
    [
        ("en", 1.0, "english", ""),
        ("und", 0.0, "english", ""),
        ("de", 0.4, "english", ""),  # 0.9 * 0.6 is more than 0.5
        ("de", 0.6, "any", ""),
        ("de", 0.9, "any", "language"),
    ],
)
def test_a_doubtful_language_lowers_the_quality_and_a_certain_one_excludes(
    language: str, ratio: float, winner: str, excluded: str
) -> None:
    context = make_context(language=language, language_ratio=ratio)
    decision = decision_for(make_selector(BILINGUAL), context)
    assert decision.slm_id == winner
    found = {c.slm_id: c for c in decision.candidates}
    assert found["english"].excluded_by == excluded
    if not excluded:
        foreign = language not in ("en", "und")
        assert found["english"].quality == pytest.approx(0.9 * (1.0 - ratio if foreign else 1.0))
    assert found["any"].quality == 0.5


def test_when_no_slm_has_the_language_all_may_answer() -> None:
    fleet = make_fleet(make_spec("english"), make_spec("french", languages=["fr"]))
    context = make_context(language="de", language_ratio=1.0)
    assert set(decision_for(make_selector(fleet), context).ranking) == {"english", "french"}


def test_an_slm_that_sleeps_is_not_preferred_for_a_language_that_it_lacks() -> None:
    asleep = {"english": make_state("english", residency=Residency.ASLEEP)}
    target = make_selector(BILINGUAL, asleep)
    assert decision_for(target, make_context(language="en")).preferred == "english"
    doubtful = make_context(language="de", language_ratio=0.6)
    assert decision_for(target, doubtful).preferred == "any"


def test_a_doubtful_language_is_in_the_log_from_which_a_decision_is_replayed() -> None:
    target = make_selector(BILINGUAL)
    decision = decision_for(target, make_context(language="de", language_ratio=0.6))
    logged = read_decision(
        make_outcome(terms=decision_terms(decision), numbers=decision.context.features.numbers)
    )
    assert logged is not None
    again = rescore(logged)
    assert {c.slm_id: c.quality for c in again} == pytest.approx(
        {c.slm_id: c.quality for c in decision.candidates}
    )
    assert redecide(logged, again) == "any"


def test_the_last_one_standing_says_so() -> None:
    decision = decide(make_selector(make_fleet(make_spec("one"))))
    assert decision.reason is DecisionReason.ONLY_CANDIDATE


def test_exploration_is_labelled_and_its_propensities_sum_to_one() -> None:
    target = make_selector(predictor=Oracle(sql=0.7), goals=make_goals(exploration_ratio=0.5))
    decisions = [decision_for(target, make_context(request_id=f"r{i}")) for i in range(600)]
    best = decisions[0].candidates[0].slm_id
    for decision in decisions:
        deviates = decision.slm_id != best
        assert (decision.path is DecisionPath.EXPLORED) == deviates
        assert (decision.reason is DecisionReason.EXPLORATION) == deviates
        assert sorted(decision.ranking) == ["chat", "cloud", "guard", "sql"]
    by_slm = {d.slm_id: d.propensity for d in decisions}
    assert set(by_slm) == {"chat", "cloud", "guard", "sql"}
    assert sum(by_slm.values()) == pytest.approx(1.0)
    share = Counter(d.slm_id for d in decisions)
    assert share[best] / 600 == pytest.approx(by_slm[best], abs=0.06)


def test_when_everything_is_down_the_fleet_is_unavailable() -> None:
    fleet = make_fleet()
    down = {s.id: make_state(s.id, replicas=0) for s in fleet.slms}
    with pytest.raises(SLMUnavailableError, match="small, large: available"):
        decide(make_selector(fleet, down))


def test_when_nothing_is_capable_the_request_is_at_fault() -> None:
    with pytest.raises(NoCandidateError, match=r"chat, .*: no_tools") as caught:
        decide(make_selector(), tools=[{"type": "function"}])
    assert caught.value.param == "tools"
    assert "capabilities.tools" in caught.value.message


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("good morning", {}),
        ("select * from t", {}),
        ("either one", {}),
        ("my password", {}),
        ("good morning", {"model": "sql:strict"}),
    ],
)
def test_a_logged_context_replays_to_the_same_decision_bit_for_bit(
    text: str, fields: dict[str, Any]
) -> None:
    states = {"chat": make_state("chat", running=3, waiting=1, tpot_s=0.1 / 3)}
    goals = make_goals(exploration_ratio=0.5)
    logged = decide(make_selector(states=states, goals=goals), text, **fields)
    for _ in range(2):
        replayed = decision_for(make_selector(states=states, goals=goals), logged.context)
        assert repr(replace(replayed, decided_in_s=logged.decided_in_s)) == repr(logged)


def test_versions_change_with_what_they_name_and_with_nothing_else() -> None:
    target = make_selector()
    before = target.versions
    target.set_goals(make_goals(quality_floor=0.1))
    assert target.versions.goals != before.goals
    assert target.versions.fleet == before.fleet
    target.set_fleet(make_fleet())
    assert target.versions.fleet != before.fleet
    assert make_selector().versions == before


def test_a_new_fleet_is_used_at_once() -> None:
    target = make_selector()
    target.set_fleet(make_fleet(make_spec("new")))
    assert decide(target).slm_id == "new"
    with pytest.raises(UnknownModelError):
        decide(target, model="chat")


def test_decisions_are_remembered_up_to_a_bound() -> None:
    target = make_selector(decision_log=3)
    request = parse_chat({"messages": [{"role": "user", "content": "hi"}]})
    for i in range(10):
        target.decide(request, Overrides(), f"d{i}")
    assert [target.recall(f"d{i}") is not None for i in range(10)] == [False] * 7 + [True] * 3


def test_decisions_leave_nothing_behind_but_a_bounded_log() -> None:
    target = make_selector(decision_log=5, conversations=50)

    def blocks_after(decisions: int) -> int:
        for i in range(decisions):
            request = parse_chat({"messages": [{"role": "user", "content": f"select {i} or été"}]})
            target.decide(request, Overrides(), f"d{i:06}")
        gc.collect()
        return sys.getallocatedblocks()

    before = blocks_after(100)
    assert blocks_after(1000) - before < 500  # less than one object per decision


def test_the_explanation_is_plain_data_of_the_whole_record() -> None:
    target = make_selector()
    decision = decide(target)
    explained = target.explain(decision)
    versions = {**asdict(decision.versions), "predictor": "prior"}
    assert explained == {**asdict(decision), "versions": versions}
    assert {c["slm_id"] for c in explained["candidates"]} == set(target.specs)


def test_decision_time_is_measured_by_the_given_timer() -> None:
    clock = FakeClock()

    class Slow(Oracle):
        def predict(self, *args: Any) -> list[Prediction]:
            clock.advance(0.25)
            return super().predict(*args)

    assert decide(make_selector(predictor=Slow(), timer=clock)).decided_in_s == 0.25
