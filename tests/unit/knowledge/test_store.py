"""The outcome store on SQLite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.columns import decode_signals
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.types import (
    DecisionTerms,
    EngineFacts,
    GeneralTerms,
    LoadAtDecision,
    LoggedCandidate,
    Novelty,
    Outcome,
    Prediction,
    PredictorVersion,
    QualitySignal,
    ServiceLevel,
    ShadowChoice,
    Versions,
    Weights,
)
from tests.knowledge_data import CODER, TALKER, make_outcome, make_world

GOOD = QualitySignal("feedback", 1.0, 5.0)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'log.sqlite'}"


@pytest.fixture
def store(url: str) -> Iterator[OutcomeStore]:
    opened = OutcomeStore(url)
    yield opened
    opened.close()


def test_an_outcome_comes_back_exactly_as_it_was(store: OutcomeStore) -> None:
    outcome = make_outcome(
        "a",
        ttft_s=0.1 + 0.2,
        energy_j=None,
        cold=True,
        prompt_text="¿qué?",
        signals=(GOOD, QualitySignal("validator:json", 0.0, 4.0)),
    )
    store.append([outcome])
    assert store.get("a") == outcome


def test_every_field_of_every_record_comes_back(store: OutcomeStore) -> None:
    prediction = Prediction(CODER, 0.9, 10.0, 0.05, 0.01, 1.0, ttft_spread=0.3, e2e_spread=0.2)
    other = Prediction(TALKER, 0.4, 20.0, 0.1, 0.02, 2.0)
    outcome = make_outcome(
        "a",
        adapter="en",
        predicted=prediction,
        versions=Versions(PredictorVersion("p", "new-1", shipped=True), "g", "f"),
        load_features=(0.25, 4.0),
        load=LoadAtDecision(1.5, 3, 1.25),
        terms=DecisionTerms(
            (
                LoggedCandidate(prediction, True, 0.5, GeneralTerms(0.6, 0.45)),
                LoggedCandidate(other, False, 1.0),
            ),
            Weights(0.1, 0.2, 0.3, late_e2e_per_s=1.0, late_e2e_after_s=2.0),
            left_out=3,
            slo=ServiceLevel(ttft_ms=200.0, deadline_s=4.0),
            quality_floor=0.25,
        ),
        preferred=TALKER,
        preferred_hot=False,
        bits=(7, 40_000, 65_535),
        novelty=Novelty(0.42, 0.37),
        shadow=ShadowChoice("v2", TALKER, agrees=False, success_ratio=0.7, gain=-0.1),
        engine=EngineFacts("b", 100, 60, 10, 0.02, 0.03, 1.5, "counter", 2, 1, 0.5),
    )
    bare = Outcome("bare", CODER)
    store.append([outcome, bare])
    assert (store.get("a"), store.get("bare")) == (outcome, bare)


def test_acknowledged_outcomes_are_there_after_a_restart(url: str, store: OutcomeStore) -> None:
    store.append(make_world(30))
    again = OutcomeStore(url)  # the first one was never closed, as after a kill
    assert again.recent(100) == make_world(30)
    again.close()


def test_sqlite_writes_ahead_and_syncs_every_commit(store: OutcomeStore) -> None:
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_a_repeated_batch_adds_nothing(store: OutcomeStore) -> None:
    rows = make_world(10)
    assert len(store.append(rows)) == 10
    assert store.append([*rows, make_outcome("new"), make_outcome("new")]) == {"new"}
    assert store.count() == 11
    assert store.labelled_total() == 10


def test_a_batch_that_cannot_be_stored_leaves_nothing_behind(store: OutcomeStore) -> None:
    with pytest.raises(KnowledgeError, match="cannot append"):
        store.append([make_outcome("fine"), make_outcome("bad", load_features=(math.nan,))])
    assert store.count() == 0


def test_feedback_before_its_outcome_is_joined_later(store: OutcomeStore) -> None:
    assert store.add_signals("late", [GOOD]) is False
    assert store.labelled_count() == 0
    store.append([make_outcome("late")])
    found = store.get("late")
    assert found is not None
    assert found.signals == (GOOD,)
    assert [o.outcome_id for o in store.recent(10, labelled=True)] == ["late"]


def test_feedback_labels_a_known_outcome_once(store: OutcomeStore) -> None:
    store.append([make_outcome("a"), make_outcome("b")])
    assert store.add_signals("a", [GOOD]) is True
    assert store.add_signals("a", [GOOD]) is True
    assert store.labelled_count() == 1
    assert store.labelled_total() == 1


def test_the_latest_signal_of_a_source_counts_whatever_the_order_of_arrival(
    store: OutcomeStore,
) -> None:
    late = QualitySignal("feedback", 0.0, 9.0)
    store.append([make_outcome("a")])
    store.add_signals("a", [late])
    store.add_signals("a", [GOOD])
    found = store.get("a")
    assert found is not None
    assert found.signals == (late,)


def test_rows_page_through_everything_in_order_of_arrival(store: OutcomeStore) -> None:
    store.append(make_world(25))
    seen, since = [], 0
    while page := store.rows(since, 10):
        assert len(page) <= 10
        seen += [o.outcome_id for _, o in page]
        since = page[-1][0]
    assert seen == [f"o{i}" for i in range(25)]


def test_recent_sorts_by_time_even_when_an_old_outcome_arrives_late(store: OutcomeStore) -> None:
    store.append([make_outcome("second", at=2.0), make_outcome("third", at=3.0)])
    store.append([make_outcome("first", at=1.0)])
    assert [o.outcome_id for o in store.recent(10)] == ["first", "second", "third"]
    assert [o.outcome_id for o in store.recent(2)] == ["second", "third"]


def test_pruning_keeps_the_newest_and_forgets_signals_of_the_rest(store: OutcomeStore) -> None:
    store.append(make_world(20))
    assert store.prune(5) == 15
    assert [o.outcome_id for _, o in store.rows(0, 50)] == [f"o{i}" for i in range(15, 20)]
    assert store.labelled_total() == 20
    store.append([make_outcome("o0")])  # its old signal must not come back
    again = store.get("o0")
    assert again is not None
    assert again.signals == ()


def test_pruning_bounds_signals_that_wait_for_an_outcome(store: OutcomeStore) -> None:
    for i in range(10):
        store.add_signals(f"never{i}", [GOOD])
    store.prune(3)
    store.append([make_outcome("never0"), make_outcome("never9")])
    assert store.labelled_count() == 1


def test_pruning_below_the_limit_deletes_nothing(store: OutcomeStore) -> None:
    store.append(make_world(5))
    assert store.prune(5) == 0
    assert store.count() == 5


def test_meta_values_survive_a_restart(url: str, store: OutcomeStore) -> None:
    assert store.meta("champion") is None
    store.set_meta("champion", "v1")
    store.set_meta("champion", "v2")
    again = OutcomeStore(url)
    assert again.meta("champion") == "v2"
    again.close()


def test_a_wrong_url_is_a_knowledge_error() -> None:
    with pytest.raises(KnowledgeError, match="cannot open"):
        OutcomeStore("no such url")


def test_a_prompt_with_characters_no_database_takes_is_stored(store: OutcomeStore) -> None:
    store.append([make_outcome("a", prompt_text="zero\0 and half \ud800")])
    found = store.get("a")
    assert found is not None
    assert found.prompt_text == "zero\ufffd and half ?"


def test_a_signal_outside_its_range_is_refused() -> None:
    with pytest.raises(KnowledgeError, match="not in"):
        decode_signals([{"source": "feedback", "value": 2.0}])
