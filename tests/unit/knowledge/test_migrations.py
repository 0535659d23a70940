"""A store of an earlier program is brought forward; one of a newer program is left untouched."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.migrations.versions import schema_2
from calm_serve.knowledge.schema import METADATA
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.learning.decision_log import read_decision, redecide, rescore
from calm_serve.testing import make_outcome
from tests.stored_content import assert_brought_forward, sqlite_of_schema_1


def opened(path: Path) -> OutcomeStore:
    return OutcomeStore(f"sqlite:///{path}")


def execute(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    found = connection.execute(statement).fetchall()
    connection.commit()
    connection.close()
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_store_from_before_migrations_is_brought_forward_whole(tmp_path: Path) -> None:
    store = opened(sqlite_of_schema_1(tmp_path))
    assert_brought_forward(store)
    store.close()


def test_logged_choices_are_made_again_after_the_migration(tmp_path: Path) -> None:
    store = opened(sqlite_of_schema_1(tmp_path))
    logged = [d for _, o in store.rows(0, 1000) if (d := read_decision(o)) is not None]
    best = [d for d in logged if d.outcome.decision.reason == "best_score"]
    again = [redecide(d, rescore(d)) for d in best]
    assert len(best) > 10
    assert again == [d.chosen for d in best]
    store.close()


def test_a_store_that_was_brought_forward_takes_new_outcomes(tmp_path: Path) -> None:
    path = sqlite_of_schema_1(tmp_path)
    opened(path).close()
    store, outcome = opened(path), make_outcome("new")
    store.append([outcome])
    assert store.get("new") == outcome
    store.close()


def test_pages_of_any_size_bring_every_row_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema_2, "PAGE_ROWS", 7)
    store = opened(sqlite_of_schema_1(tmp_path))
    assert_brought_forward(store)
    store.close()


def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    path = sqlite_of_schema_1(tmp_path)
    execute(path, "UPDATE outcomes SET versions = '[]' WHERE row = (SELECT max(row) FROM outcomes)")
    with pytest.raises(KnowledgeError):
        opened(path)
    columns = {str(row[1]) for row in execute(path, "PRAGMA table_info(outcomes)")}
    assert "extra" in columns and "terms" not in columns
    assert execute(path, "SELECT name FROM sqlite_master WHERE name = 'alembic_version'") == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET value = '4' WHERE key = 'schema_version'",
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)",
    ],
)
def test_a_store_of_a_newer_program_is_refused_untouched(tmp_path: Path, statement: str) -> None:
    path = sqlite_of_schema_1(tmp_path)
    execute(path, statement)
    if "alembic" in statement:
        execute(path, "INSERT INTO alembic_version VALUES ('99')")
    before = digest(path)
    with pytest.raises(KnowledgeError, match="newer program wrote; it was left untouched"):
        opened(path)
    assert digest(path) == before


def test_programs_before_migrations_refuse_the_store_by_its_version(tmp_path: Path) -> None:
    path = sqlite_of_schema_1(tmp_path)
    opened(path).close()
    assert execute(path, "SELECT value FROM meta WHERE key = 'schema_version'") == [("4",)]


@pytest.mark.parametrize("old", [True, False])
def test_the_tables_are_those_that_the_program_uses(tmp_path: Path, old: bool) -> None:
    path = sqlite_of_schema_1(tmp_path) if old else tmp_path / "new.sqlite"
    opened(path).close()
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    engine.dispose()
