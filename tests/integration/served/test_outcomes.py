"""What is acknowledged is durable: outcomes and feedback are in the store, whatever dies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import psutil

from calm_serve.requests.features import NUMBER_NAMES
from tests.integration.served_fleet import ServedFleet, eventually

SONG = "Extract intent and slots as JSON: play some jazz by Miles Davis"


def test_an_outcome_row_has_what_learning_needs(fleet: ServedFleet) -> None:
    answer = fleet.chat(SONG, headers={"x-calm-task": "songs"}, max_tokens=40, temperature=0)
    usage = answer.json()["usage"]
    row = fleet.outcome(answer.headers["x-calm-decision-id"])
    decision, timing, engine = row.decision, row.timing, row.engine
    assert (row.slm_id, decision.path, decision.rule) == ("extract", "rule", "names-slots")
    assert (row.status, row.http_status, row.task) == ("ok", 200, "songs")
    assert len(row.features.numbers) == len(NUMBER_NAMES) and row.features.buckets
    assert decision.load_features
    assert decision.propensity == 1.0
    assert engine.prompt_tokens == usage["prompt_tokens"]
    assert engine.output_tokens == usage["completion_tokens"]
    assert timing.ttft_s is not None and timing.e2e_s is not None
    assert 0 < timing.ttft_s <= timing.e2e_s
    assert engine.energy_j is not None and engine.energy_j > 0
    assert engine.replica_id and engine.replica_id == row.predicted_replica
    assert 0 < timing.decision_s < 0.1
    assert abs(row.at - time.time()) < 60
    assert str(decision.versions.predictor) == fleet.get("/v1/fleet")["predictor"]["version"]


def test_a_scored_request_stores_what_was_predicted_for_it(fleet: ServedFleet) -> None:
    answer = fleet.chat("How many apples does Tom have left?", max_tokens=4)
    row = fleet.outcome(answer.headers["x-calm-decision-id"])
    assert row.decision.path in ("scored", "explored", "prior")
    assert row.decision.predicted is not None
    assert 0 < row.decision.predicted.success_ratio < 1


def test_prompts_are_stored_only_when_configured(fleet: ServedFleet) -> None:
    secret = "zyxwvut the unmistakable words"
    row = fleet.outcome(fleet.chat(secret, max_tokens=2).headers["x-calm-decision-id"])
    assert row.prompt_text is None
    for file in fleet.state_dir.rglob("*"):
        assert not file.is_file() or b"zyxwvut" not in file.read_bytes()


def test_a_repeated_prompt_is_found_in_the_prefix_cache(fleet: ServedFleet) -> None:
    text = SONG + " and then " + "another song " * 40
    ids = [fleet.chat(text, max_tokens=2).headers["x-calm-decision-id"] for _ in range(2)]
    first, second = (fleet.outcome(i) for i in ids)
    assert second.engine.cached_tokens > first.engine.cached_tokens
    assert second.engine.cached_tokens > second.engine.prompt_tokens / 2


def test_feedback_is_stored_with_its_outcome(fleet: ServedFleet) -> None:
    decision_id = fleet.chat("list files", "shell", max_tokens=2).headers["x-calm-decision-id"]
    feedback = fleet.post("/v1/feedback", {"decision_id": decision_id, "score": 0.75})
    assert feedback.json() == {"decision_id": decision_id, "accepted": True}
    signals = {s.source: s.value for s in fleet.outcome(decision_id).signals}
    assert signals["feedback"] == 0.75


def test_a_reply_that_the_client_cut_is_no_evidence_about_the_slm(fleet: ServedFleet) -> None:
    cut = fleet.chat(SONG, "extract", max_tokens=3)
    assert fleet.outcome(cut.headers["x-calm-decision-id"]).signals == ()


def test_a_check_that_the_client_requested_labels_the_outcome(fleet: ServedFleet) -> None:
    answer = fleet.chat(SONG, headers={"x-calm-validate": "json"}, max_tokens=160, temperature=0)
    cut = fleet.chat(SONG, headers={"x-calm-validate": "json"}, max_tokens=3)
    labels = []
    for decision in (answer, cut):
        row = fleet.outcome(decision.headers["x-calm-decision-id"])
        labels.append({s.source: s.value for s in row.signals}["validator:json"])
    assert labels == [1.0, 0.0]


def test_killing_the_knowledge_actor_loses_nothing_and_stops_no_request(fleet: ServedFleet) -> None:
    version = fleet.get("/v1/fleet")["predictor"]["version"]
    fleet.settle()
    with fleet.store() as store:
        before = store.count()
    acknowledged = [
        fleet.chat("list files", "shell", max_tokens=2).headers["x-calm-decision-id"]
        for _ in range(5)
    ]
    actor = knowledge_actor(fleet)
    actor.kill()
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda i: fleet.chat(f"list {i}", "shell", max_tokens=2), range(40))
        )
    assert [a.status_code for a in answers] == [200] * 40
    for decision_id in (*acknowledged, *(a.headers["x-calm-decision-id"] for a in answers)):
        assert fleet.outcome(decision_id).status == "ok"
    fleet.settle()
    with fleet.store() as store:
        assert store.count() == before + 45
    assert knowledge_actor(fleet).pid != actor.pid
    feedback = {"decision_id": acknowledged[0], "score": 1}
    eventually(
        "feedback works", lambda: fleet.post("/v1/feedback", feedback).status_code == 200, 30.0
    )
    eventually(
        "every router is connected again, and its predictor is the same",
        lambda: all(
            d["predictor"]["knowledge_reachable"] and d["predictor"]["version"] == version
            for d in fleet.each_router("/v1/fleet")
        ),
        30.0,
    )


def knowledge_actor(fleet: ServedFleet) -> psutil.Process:
    """The process that runs the actor now."""

    def find() -> psutil.Process | None:
        found = [p for p in fleet.processes() if "KnowledgeActor" in " ".join(p.cmdline())]
        return found[0] if found else None

    return eventually("the knowledge actor runs", find, 30.0)


def test_an_slm_replica_holds_no_database_and_no_training_library(fleet: ServedFleet) -> None:
    # Whatever it imports for its own work, Ray imports the class of each actor that it looks up.
    replicas = [p for p in fleet.processes() if "slm-" in " ".join(p.cmdline())]
    assert replicas
    for replica in replicas:
        libraries = [m.path for m in replica.memory_maps()]
        assert any("torch" in path for path in libraries)
        assert not [p for p in libraries if "sqlalchemy" in p or "lightgbm" in p]
