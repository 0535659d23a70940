"""Stores that earlier programs wrote, and what those programs read back from them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from calm_serve.knowledge.store import OutcomeStore
from calm_serve.protocol.outcomes import OUTCOME

FOLDER = Path(__file__).parent / "stores"


def sqlite_of_schema_1(folder: Path) -> Path:
    """An SQLite store of schema 1, unpacked."""
    path = folder / "outcomes.sqlite"
    path.write_bytes(gzip.decompress((FOLDER / "schema_1.sqlite.gz").read_bytes()))
    return path


def dump_of_schema_1() -> str:
    """The same content as a PostgreSQL dump."""
    return gzip.decompress((FOLDER / "schema_1_postgres.sql.gz").read_bytes()).decode()


def content_of_schema_1() -> dict[str, Any]:
    """What the program of that time read."""
    found: dict[str, Any] = json.loads(
        gzip.decompress((FOLDER / "schema_1_content.json.gz").read_bytes())
    )
    return found


def assert_brought_forward(store: OutcomeStore) -> None:
    """Everything of schema 1 is in `store`, as records of this program."""
    content = content_of_schema_1()
    rows = store.rows(0, 1000)
    assert [row for row, _ in rows] == [entry["row"] for entry in content["outcomes"]]
    for (_, outcome), entry in zip(rows, content["outcomes"], strict=True):
        # Two independent ways: the migration, and the record's upgrade.
        assert outcome == OUTCOME.from_plain(entry["outcome"])
    assert store.count() == content["count"]
    assert store.labelled_count() == content["labelled_count"]
    assert store.labelled_total() == content["labelled_total"]
    texts = {k: v for k, v in content["meta"].items() if k not in ("schema_version", "settings")}
    assert {key: store.meta(key) for key in texts} == texts
    assert store.configured_goals() == content["configured_goals"]
    changes = store.goal_changes(1000)
    assert [c.revision for c in changes] == [c["revision"] for c in content["goal_changes"]]
    assert [(c.by, c.new) for c in changes] == [
        (c["by"], c["new"]) for c in content["goal_changes"]
    ]
