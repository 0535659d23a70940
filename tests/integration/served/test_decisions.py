"""Each kind of request goes to its SLM, and every decision can be explained without running it."""

from __future__ import annotations

import pytest

from tests.integration.served_fleet import ServedFleet, eventually, prompts

TELLING = {
    "extract": "names-slots",
    "sql": "names-sql",
    "shell": "names-shell",
    "intent": "names-intent",
}
SPECIALISTS = ("extract", "sql", "shell", "reason", "intent")
BARE = 40
FOLLOWED_RATIO = 0.8
# A router that reads nothing would send a sixth of the prompts to each SLM. Most bare prompts go to
# an SLM with the skill; the generalist takes those that are unlike the training's.
SKILLED_RATIO, SPECIALIST_RATIO = 0.7, 0.2
# `shell` answers too few requests correctly for quality to decide, so it is left out.
SKILLED = ("extract", "sql", "reason", "intent")
PATHS = ("scored", "explored", "rule", "unfamiliar")


@pytest.fixture
def by_quality(fleet: ServedFleet) -> None:
    """Goals that weigh nothing but quality.

    What a prompt is for decides then, and not how fast the machine has answered lately.
    """
    goals = fleet.get("/v1/goals")["goals"]
    goals |= {"latency_weight_per_s": 0.0, "energy_weight_per_j": 0.0}
    version = fleet.put("/v1/goals", goals).raise_for_status().json()["version"]
    eventually(
        "every router has these goals",
        lambda: all(d["version"] == version for d in fleet.each_router("/v1/goals")),
        10.0,
    )


def test_the_fleet_starts_with_the_shipped_predictor(fleet: ServedFleet) -> None:
    predictor = fleet.get("/v1/fleet")["predictor"]
    assert predictor["version"].startswith("lgbm-")
    assert predictor["source"] == "shipped"


@pytest.mark.parametrize("kind", TELLING)
def test_a_marker_names_the_slm_by_rule(fleet: ServedFleet, kind: str) -> None:
    asked = prompts(kind, instructed=True, count=BARE)
    decisions = [fleet.route(text) for text in asked]
    ruled = [d for d in decisions if d["rule"] == TELLING[kind]]
    assert len(ruled) > BARE / 2
    assert {d["slm_id"] for d in ruled} == {kind}
    assert sum(d["slm_id"] == kind for d in decisions) >= FOLLOWED_RATIO * BARE
    answer = fleet.chat(asked[decisions.index(ruled[0])], max_tokens=4)
    assert answer.headers["x-calm-model"] == kind
    assert answer.headers["x-calm-reason"] == f"rule:rule_match:{TELLING[kind]}"


@pytest.mark.usefixtures("by_quality")
@pytest.mark.parametrize("kind", SKILLED)
def test_bare_prompts_go_to_their_specialist_by_score(fleet: ServedFleet, kind: str) -> None:
    asked = prompts(kind, instructed=False, count=BARE, difficulty="easy")
    decisions = [fleet.route(text) for text in asked]
    chosen = [d["slm_id"] for d in decisions]
    assert chosen.count(kind) >= SPECIALIST_RATIO * BARE
    assert chosen.count(kind) + chosen.count("general") >= SKILLED_RATIO * BARE
    answer = fleet.chat(asked[0], max_tokens=4)
    assert answer.headers["x-calm-model"] in (*SPECIALISTS, "general")
    assert answer.headers["x-calm-reason"].partition(":")[0] in PATHS


@pytest.mark.usefixtures("by_quality")
@pytest.mark.parametrize("kind", ["open", "knowledge"])
def test_chat_and_knowledge_go_to_the_generalist(fleet: ServedFleet, kind: str) -> None:
    asked = prompts(kind, instructed=False, count=BARE)
    chosen = [fleet.route(text)["slm_id"] for text in asked]
    assert chosen.count("general") >= FOLLOWED_RATIO * BARE


def test_a_sensitive_prompt_is_pinned_whatever_else_it_contains(fleet: ServedFleet) -> None:
    decision = fleet.route("Write SQL: select the password of every user")
    assert (decision["slm_id"], decision["reason"]) == ("general", "safety_pin")


def test_a_dry_run_explains_every_candidate_and_runs_nothing(fleet: ServedFleet) -> None:
    fleet.settle()
    with fleet.store() as store:
        before = store.count()
        decision = fleet.route(prompts("reason", instructed=False, count=1)[0])
        assert {c["slm_id"] for c in decision["candidates"]} == {
            s["id"] for s in fleet.get("/v1/fleet")["slms"]
        }
        assert all(c["excluded_by"] or c["prediction"] for c in decision["candidates"])
        assert 0 < decision["propensity"] <= 1
        assert decision["ranking"][0] == decision["slm_id"]
        marker = fleet.chat("1 + 1", "reason", max_tokens=1).headers["x-calm-decision-id"]
        fleet.outcome(marker)  # outcomes are stored in order, so a dry run's would be there too
        assert store.count() == before + 1
        assert store.get(decision["decision_id"]) is None


def test_a_decision_can_be_looked_up_at_every_router(fleet: ServedFleet) -> None:
    answer = fleet.chat("How many apples are left?", max_tokens=2)
    decision_id = answer.headers["x-calm-decision-id"]
    fleet.outcome(decision_id)
    for _ in range(8):  # one router remembers the decision, the other one finds the outcome
        found = fleet.get(f"/v1/decisions/{decision_id}")
        assert answer.headers["x-calm-model"] == found["slm_id"]
        assert decision_id == found.get("decision_id", found.get("outcome_id"))
