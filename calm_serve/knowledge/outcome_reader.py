"""Outcome reader: outcomes of a log, which is a store or a file of JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge.store import OutcomeStore
from calm_serve.protocol.outcomes import OUTCOME, check
from calm_serve.types import Outcome

PAGE_ROWS = 1000  # rows in memory at a time


def read_outcomes(log: str) -> Iterator[Outcome]:
    """Outcomes of a log: a JSON-lines file, an SQLite file or an SQLAlchemy URL.

    Raises KnowledgeError when it is not a log, or a line of it is not an outcome.
    """
    path = _file_of(log)
    if path is not None and not path.is_file():  # opening it would create a store
        raise KnowledgeError(f"log not found: {log}")
    if path is not None and path.suffix in (".jsonl", ".json"):
        yield from _read_lines(path)
        return
    store = OutcomeStore(log if "://" in log else f"sqlite:///{path}")
    try:
        row = 0
        while page := store.rows(row, PAGE_ROWS):
            yield from (outcome for _, outcome in page)
            row = page[-1][0]
    finally:
        store.close()


def _file_of(log: str) -> Path | None:
    """The file of the log, None for a database server."""
    scheme, url, path = log.partition(":///")
    if url and scheme.startswith("sqlite"):
        return Path(path)
    return None if "://" in log else Path(log)


def _read_lines(path: Path) -> Iterator[Outcome]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield check(OUTCOME.decode(line))
            except KnowledgeError as error:
                raise KnowledgeError(f"{path.name}:{number}: {error}") from error
