"""The outcome store and a retraining on a real PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psycopg
import pytest
import sqlalchemy as sa

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.schema import METADATA
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.knowledge.training_process import retrain_from_store
from calm_serve.learning.retraining import RetrainJob
from calm_serve.types import QualitySignal
from tests.knowledge_data import CODER, TALKER, make_outcome, make_world
from tests.postgres_server import postgres_server
from tests.stored_content import assert_brought_forward, dump_of_schema_1

GOOD = QualitySignal("feedback", 1.0, 5.0)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres_server() as started:
        yield started


@pytest.fixture
def store(url: str) -> Iterator[OutcomeStore]:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    METADATA.drop_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS alembic_version")
    engine.dispose()
    opened = OutcomeStore(url)
    yield opened
    opened.close()


def test_the_server_is_postgresql(store: OutcomeStore) -> None:
    with store._engine.connect() as connection:
        assert "PostgreSQL" in str(connection.exec_driver_sql("SELECT version()").scalar())


def test_an_outcome_comes_back_exactly_as_it_was(store: OutcomeStore) -> None:
    outcome = make_outcome(
        "a",
        at=1.7e9 + 0.123456,
        ttft_s=0.1 + 0.2,
        energy_j=None,
        prompt_text="¿qué?",
        preferred="a",
        preferred_hot=False,
    )
    outcome = replace(outcome, signals=(GOOD, QualitySignal("validator:json", 0.0, 4.0)))
    store.append([outcome])
    assert store.get("a") == outcome


def test_a_prompt_with_characters_no_database_takes_is_stored(store: OutcomeStore) -> None:
    store.append([make_outcome("a", prompt_text="zero\0 and half \ud800")])
    found = store.get("a")
    assert found is not None
    assert found.prompt_text == "zero\ufffd and half ?"


@pytest.fixture
def empty(url: str) -> Iterator[str]:
    """The server's database without any table."""
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    engine.dispose()
    yield url


def restore(url: str, dump: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(dump.encode())


def test_a_store_from_before_migrations_is_brought_forward_whole(empty: str) -> None:
    restore(empty, dump_of_schema_1())
    store = OutcomeStore(empty)
    assert_brought_forward(store)
    store.append([make_outcome("new")])
    assert store.get("new") is not None
    store.close()


def test_two_programs_that_open_an_old_store_at_once_migrate_it_once(empty: str) -> None:
    restore(empty, dump_of_schema_1())
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(OutcomeStore, [empty, empty]))
    for store in stores:
        assert_brought_forward(store)
        store.close()


def test_a_store_of_a_newer_program_is_refused_untouched(empty: str) -> None:
    restore(empty, dump_of_schema_1())
    restore(empty, "UPDATE public.meta SET value = '3' WHERE key = 'schema_version'")
    with pytest.raises(KnowledgeError, match="schema 3, which a newer program wrote"):
        OutcomeStore(empty)
    with psycopg.connect(empty) as connection:
        columns = "SELECT column_name FROM information_schema.columns WHERE table_name = 'outcomes'"
        names = {row[0] for row in connection.execute(columns)}
    assert "extra" in names and "terms" not in names


def test_a_repeated_batch_adds_nothing(store: OutcomeStore) -> None:
    rows = make_world(50)
    assert len(store.append(rows)) == 50
    assert store.append([*rows, make_outcome("new"), make_outcome("new")]) == {"new"}
    assert store.count() == 51
    assert store.labelled_total() == 50


def test_two_writers_of_the_same_batch_store_it_once(url: str, store: OutcomeStore) -> None:
    other = OutcomeStore(url)
    rows = make_world(200)
    with ThreadPoolExecutor(2) as pool:
        added = list(pool.map(lambda s: len(s.append(rows)), (store, other)))
    other.close()
    assert sum(added) == 200
    assert store.count() == 200


def test_a_batch_that_cannot_be_stored_leaves_nothing_behind(store: OutcomeStore) -> None:
    with pytest.raises(KnowledgeError, match="cannot append"):
        store.append([make_outcome("fine"), make_outcome("bad", numbers=(float("nan"),))])
    assert store.count() == 0


def test_feedback_in_either_order_gives_one_label(store: OutcomeStore) -> None:
    assert store.add_signals("late", [GOOD]) is False
    store.append([make_outcome("late")])
    assert store.add_signals("late", [replace(GOOD, value=0.0, at=1.0)]) is True
    (found,) = store.recent(10, labelled=True)
    assert found.signals == (GOOD,)
    assert store.labelled_total() == 1


def test_paging_recent_and_pruning_agree_with_time(store: OutcomeStore) -> None:
    store.append(make_world(30))
    store.append([make_outcome("old", at=1.0)])
    assert store.recent(31)[0].outcome_id == "old"
    first = store.rows(0, 20)
    assert len(first) == 20
    assert [o.outcome_id for _, o in store.rows(first[-1][0], 20)][-1] == "old"
    assert store.prune(5) == 26
    assert store.count() == 5
    assert store.prune(5) == 0


def test_training_on_postgresql_equals_training_on_sqlite(
    url: str, store: OutcomeStore, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lite_url = f"sqlite:///{tmp_path_factory.mktemp('lite') / 'log.sqlite'}"
    lite = OutcomeStore(lite_url)
    for each in (store, lite):
        each.append(make_world(200))
    lite.close()
    postgres, sqlite = (
        retrain_from_store(RetrainJob(u, (CODER, TALKER), None, 0.25), lambda: 1.0)
        for u in (url, lite_url)
    )
    assert postgres.blob is not None
    assert postgres == sqlite


def test_an_unreachable_database_is_named_at_once_without_its_password() -> None:
    started = time.monotonic()
    with pytest.raises(KnowledgeError) as caught:
        OutcomeStore("postgresql://calm:secret@127.0.0.1:1/calm")
    assert time.monotonic() - started < 10
    assert "127.0.0.1" in caught.value.message
    assert "secret" not in caught.value.message
