"""What each baseline chooses, and how the selector uses it."""

from __future__ import annotations

from typing import Any

import pytest

from calm_serve.config import Fleet
from calm_serve.config.loading import check_policy
from calm_serve.errors import ConfigError, NoCandidateError
from calm_serve.requests import Overrides, parse_chat
from calm_serve.requests.features import text_buckets
from calm_serve.routing.baselines import Baseline
from calm_serve.routing.calm_paper import ENERGY_WEIGHT, LATENCY_WEIGHT, WINDOW, Similarity
from calm_serve.routing.factory import build
from calm_serve.routing.selector import ModelSelector, assume_hot
from calm_serve.testing import (
    make_context,
    make_fleet,
    make_goals,
    make_outcome,
    make_prediction,
    make_spec,
    make_state,
)
from calm_serve.types import Candidate, Decision, DecisionPath, DecisionReason, PromptFeatures

FLEET = make_fleet(
    make_spec("sql", parameters=2, skills=["sql"], description="Question to SQL queries."),
    make_spec("poet", parameters=2, description="Poems and sonnets about the sea."),
    make_spec("wide", parameters=5, skills=["sql", "chat"], description="Anything else."),
    make_spec("huge", parameters=9, skills=["chat"], description="Long answers."),
    markers={"query": "query", "either": "either"},
    rules=[
        {"name": "asks", "marker": "query", "slms": ["sql"]},
        {"name": "either", "marker": "either", "slms": ["huge", "poet"]},
    ],
    safety=[{"name": "secret", "pattern": "password", "slm": "poet"}],
)
IDS = tuple(s.id for s in FLEET.slms)
STATES = {i: make_state(i) for i in IDS}


def policy(name: str, **options: Any) -> Baseline:
    found = build(make_goals(policy={"name": name, **options}), FLEET, text_buckets)
    assert found is not None
    return found


def choose(target: Baseline, text: str = "", ids: tuple[str, ...] = IDS, **kw: Any) -> list[str]:
    candidates = [Candidate(i, prediction=make_prediction(i, **kw.pop(i, {}))) for i in ids]
    context = make_context(features=PromptFeatures(buckets=text_buckets(text)))
    return list(target.choose(context, candidates, kw.pop("states", STATES))[0])


def test_the_largest_has_most_parameters_and_single_comes_before_it() -> None:
    assert choose(policy("largest")) == ["huge", "wide", "poet", "sql"]
    assert choose(policy("single", slm="poet")) == ["poet", "huge", "wide", "sql"]
    assert choose(policy("single", slm="poet"), ids=("sql", "wide")) == ["wide", "sql"]


def test_rules_send_what_no_rule_decides_to_the_slm_with_most_skills() -> None:
    assert choose(policy("rules")) == ["wide", "huge", "sql", "poet"]


def test_the_fastest_has_the_shortest_predicted_answer() -> None:
    quick: dict[str, Any] = {"poet": {"ttft_s": 0.01}, "sql": {"tpot_s": 0.1}}
    assert choose(policy("fastest"), **quick) == ["poet", "huge", "wide", "sql"]


def test_the_least_loaded_has_the_lowest_share_of_busy_slots() -> None:
    busy = {i: make_state(i, running=8) for i in IDS}
    busy["wide"] = make_state("wide", running=10, capacity=40)
    assert choose(policy("least_loaded"), states=busy)[0] == "wide"


def test_turns_go_round_and_an_slm_that_could_not_serve_is_next_when_it_can() -> None:
    turns = policy("round_robin")
    assert [choose(turns)[0] for _ in range(5)] == ["huge", "poet", "sql", "wide", "huge"]
    others = ("huge", "sql", "wide")
    assert [choose(turns, ids=others)[0] for _ in range(3)] == ["sql", "wide", "huge"]
    assert choose(turns)[0] == "poet"


def test_shares_are_scaled_to_the_candidates_at_hand() -> None:
    target = policy("shares", shares={"sql": 0.6, "poet": 0.2, "wide": 0.2})
    chosen = set()
    for number in range(200):
        context = make_context(request_id=f"{number * 7919:032x}")
        candidates = [Candidate("poet"), Candidate("wide"), Candidate("huge")]
        (first, *_), propensity = target.choose(context, candidates, STATES)
        assert propensity == pytest.approx(0.5)
        chosen.add(first)
    assert chosen == {"poet", "wide"}


def test_likeness_finds_the_slm_whose_words_the_prompt_has() -> None:
    similarity = Similarity(FLEET.slms, text_buckets).of(text_buckets("a poem about the sea"))
    assert max(similarity, key=similarity.__getitem__) == "poet"
    assert 0.0 <= min(similarity.values()) <= max(similarity.values()) <= 1.0
    same = Similarity(FLEET.slms, text_buckets).of(text_buckets("Poems and sonnets about the sea."))
    assert same["poet"] == pytest.approx(1.0)


def test_an_example_makes_an_slm_like_prompts_of_its_kind() -> None:
    fleet = make_fleet(
        make_spec("music", description="Utterances.", examples=["play some jazz by miles davis"]),
        make_spec("rest", description="Everything."),
    )
    similarity = Similarity(fleet.slms, text_buckets).of(text_buckets("play jazz"))
    assert similarity["music"] > similarity["rest"]


def test_a_prompt_without_words_is_similar_to_no_slm() -> None:
    assert set(Similarity(FLEET.slms, text_buckets).of(()).values()) == {0.0}


def test_the_papers_score_is_likeness_less_recent_qos_by_fixed_weights() -> None:
    paper, text = policy("paper"), "Poems and sonnets about the sea."
    assert choose(paper, text)[0] == "poet"
    for slm_id, seconds in (("poet", 3.0), ("sql", 1.0), ("wide", 1.0), ("huge", 1.0)):
        paper.observe(make_outcome(slm_id=slm_id, e2e_s=seconds, energy_j=seconds))
    similarity = Similarity(FLEET.slms, text_buckets).of(text_buckets(text))
    assert similarity["poet"] > LATENCY_WEIGHT + ENERGY_WEIGHT
    assert choose(paper, text)[0] == "poet"  # the dearest by far, and still the likest
    assert choose(paper, "xyzzy")[-1] == "poet"  # similar to no SLM: cost decides


def test_the_paper_forgets_what_left_its_window() -> None:
    paper = policy("paper")
    paper.observe(make_outcome(slm_id="poet", e2e_s=100.0, energy_j=None))
    paper.observe(make_outcome(slm_id="sql", e2e_s=1.0, energy_j=None))
    paper.observe(make_outcome(slm_id="wide", e2e_s=2.0, energy_j=None))
    assert choose(paper, "xyzzy", ids=("poet", "wide"))[0] == "wide"
    for _ in range(WINDOW):
        paper.observe(make_outcome(slm_id="poet", e2e_s=1.5, energy_j=None))
    assert choose(paper, "xyzzy", ids=("poet", "wide"))[0] == "poet"


def test_the_paper_takes_an_slm_without_a_request_for_the_best() -> None:
    paper = policy("paper")
    for slm_id in ("huge", "poet", "sql"):
        paper.observe(make_outcome(slm_id=slm_id, e2e_s=1.0 + len(slm_id), energy_j=1.0))
    assert choose(paper, "xyzzy")[:2] == ["sql", "wide"]  # sql is the lowest, so at 0 as well


def decide(target: ModelSelector, text: str = "good morning", **fields: Any) -> Decision:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return target.decide(parse_chat(body), Overrides(), "decision")


def selector(name: str, fleet: Fleet = FLEET, **options: Any) -> ModelSelector:
    goals = make_goals(policy={"name": name, **options}, exploration_ratio=0.5)
    return ModelSelector(fleet, goals, read_state=assume_hot)


def test_the_record_says_that_a_baseline_chose_and_what_was_predicted() -> None:
    decision = decide(selector("largest"))
    assert (decision.slm_id, decision.path) == ("huge", DecisionPath.BASELINE)
    assert (decision.reason, decision.propensity) == (DecisionReason.BASELINE, 1.0)
    assert decision.ranking == ("huge", "wide", "poet", "sql")
    assert {c.slm_id for c in decision.candidates if c.prediction} == set(IDS)


def test_named_models_and_safety_come_before_any_policy() -> None:
    assert decide(selector("largest"), model="sql").slm_id == "sql"
    assert decide(selector("largest"), "my password").slm_id == "poet"


def test_hard_filters_come_before_any_policy() -> None:
    away = make_spec("away", parameters=99, locality="remote", remote={"base_url": "http://x/v1"})
    fleet = make_fleet(make_spec("near"), away)
    target = selector("single", fleet, slm="away")
    local = Overrides(local_only=True)
    body = parse_chat({"messages": [{"role": "user", "content": "hello"}]})
    assert target.decide(body, local, "decision").slm_id == "near"
    with pytest.raises(NoCandidateError):
        decide(target, max_tokens=100_000)


@pytest.mark.parametrize(("name", "chosen"), [("rules", "sql"), ("largest", "huge")])
def test_only_calm_and_rules_follow_the_rules(name: str, chosen: str) -> None:
    assert decide(selector(name), "a query").slm_id == chosen
    assert decide(selector("calm"), "a query").path is DecisionPath.RULE


def test_rules_alone_take_the_first_of_a_short_list() -> None:
    decision = decide(selector("rules"), "either way")
    assert (decision.slm_id, decision.path) == ("huge", DecisionPath.RULE)


def test_a_policy_keeps_its_memory_while_goals_change_and_others_choose() -> None:
    target = selector("round_robin")
    assert decide(target).slm_id == "huge"
    target.set_goals(target.goals.model_copy(update={"energy_weight_per_j": 1.0}))
    assert decide(target).slm_id == "poet"
    target.set_goals(make_goals())
    assert decide(target).path is DecisionPath.PRIOR
    target.set_fleet(make_fleet(*FLEET.slms, make_spec("late")))
    target.set_goals(make_goals(policy={"name": "round_robin"}))
    assert [decide(target).slm_id for _ in range(2)] == ["late", "sql"]


def test_another_policy_of_the_same_name_starts_anew() -> None:
    target = selector("single", slm="sql")
    target.set_goals(make_goals(policy={"name": "single", "slm": "poet"}))
    assert decide(target).slm_id == "poet"


def test_the_selector_passes_outcomes_to_the_policy() -> None:
    target = selector("paper")
    decision = decide(target, "xyzzy")
    slow = make_outcome(slm_id=decision.slm_id, e2e_s=9.0, energy_j=9.0)
    target.learn(decision, slow)
    target.learn(decision, make_outcome(slm_id="wide", e2e_s=1.0, energy_j=1.0))
    assert decide(target, "xyzzy").slm_id != decision.slm_id


def test_a_policy_that_names_an_unknown_slm_is_refused() -> None:
    check_policy(make_goals(policy={"name": "single", "slm": "poet"}), FLEET)
    with pytest.raises(ConfigError, match="'poett'; the nearest is 'poet'"):
        check_policy(make_goals(policy={"name": "single", "slm": "poett"}), FLEET)
    with pytest.raises(ConfigError, match="unknown SLM 'none'"):
        check_policy(make_goals(policy={"name": "shares", "shares": {"none": 1}}), FLEET)
    check_policy(make_goals(default_slm="poet"), FLEET)
    with pytest.raises(ConfigError, match=r"goals.default_slm names unknown SLM 'poett'"):
        check_policy(make_goals(default_slm="poett"), FLEET)
