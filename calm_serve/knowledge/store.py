"""Store: the durable log of outcomes in SQLite or, by URL, PostgreSQL (SQLAlchemy Core).

A write is durable when it returns: it is one transaction, and SQLite runs with WAL and
`synchronous=FULL`. One process writes (the knowledge actor); others may read. Methods block; call
them in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from calm_serve.errors import KnowledgeError
from calm_serve.knowledge import migrations
from calm_serve.knowledge.columns import from_columns, to_columns
from calm_serve.knowledge.schema import GOAL_CHANGES, META, OUTCOMES, SIGNALS
from calm_serve.learning import quality_label
from calm_serve.protocol.topics import GoalChange
from calm_serve.types import Outcome, QualitySignal

BUSY_TIMEOUT_MS = 10_000  # wait for a reader of the SQLite file
CONNECT_TIMEOUT_S = 10  # of PostgreSQL
MAX_GOAL_CHANGES = 10_000  # length of the audit trail
_CHUNK = 500  # ids in one IN list; SQLite limits the parameters of a statement


class OutcomeStore:
    """Outcomes and the signals of their quality. Every method raises KnowledgeError."""

    def __init__(self, url: str) -> None:
        """Open a store, create it, or bring an older one to the present schema.

        `url` is an SQLAlchemy URL; `postgresql://` uses psycopg.
        """
        self._name = "store"
        with self._guard("open"):
            parsed = sa.make_url(url)
            if parsed.drivername in ("postgresql", "postgres"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            self._name = parsed.render_as_string(hide_password=True)
            try:
                migrations.refuse_newer(parsed)
            except KnowledgeError as error:
                raise KnowledgeError(f"{self._name}: {error.message}") from error
            self._engine = _engine(parsed)
            postgres = self._engine.dialect.name == "postgresql"
            self._insert: Callable[[sa.Table], Any] = (
                postgresql.insert if postgres else sqlite.insert
            )
            migrations.upgrade(self._engine)

    def append(self, rows: Sequence[Outcome]) -> set[str]:
        """Store outcomes in one transaction; return the ids that were new."""
        if not rows:
            return set()
        insert = self._insert(OUTCOMES).on_conflict_do_nothing(index_elements=["outcome_id"])
        with self._guard("append"), self._engine.begin() as connection:
            new = connection.execute(
                insert.returning(OUTCOMES.c.outcome_id),
                [{**to_columns(o), "labelled": False} for o in rows],
            )
            added = set(new.scalars())
            signals = [(o.outcome_id, s) for o in rows if o.outcome_id in added for s in o.signals]
            self._write_signals(connection, signals)
            self._mark_labelled(connection, sorted(added))
        return added

    def add_signals(self, outcome_id: str, signals: Sequence[QualitySignal]) -> bool:
        """Store signals of an outcome; the latest of each source counts.

        Returns whether the outcome is known. If not, its signals are kept for it.
        """
        with self._guard("add signals"), self._engine.begin() as connection:
            self._write_signals(connection, [(outcome_id, s) for s in signals])
            self._mark_labelled(connection, [outcome_id])
            known = sa.select(OUTCOMES.c.row).where(OUTCOMES.c.outcome_id == outcome_id)
            return connection.execute(known).first() is not None

    def get(self, outcome_id: str) -> Outcome | None:
        """The outcome with its signals, None when there is none."""
        found = self._read(sa.select(OUTCOMES).where(OUTCOMES.c.outcome_id == outcome_id))
        return found[0][1] if found else None

    def rows(self, since_row: int, limit: int) -> list[tuple[int, Outcome]]:
        """At most `limit` outcomes after `since_row` in order of arrival, with their row."""
        after = sa.select(OUTCOMES).where(OUTCOMES.c.row > since_row)
        return self._read(after.order_by(OUTCOMES.c.row).limit(limit))

    def recent(self, limit: int, *, labelled: bool = False) -> list[Outcome]:
        """The newest `limit` outcomes, or `labelled` ones, oldest first by `at`."""
        newest = sa.select(OUTCOMES).order_by(OUTCOMES.c.at.desc(), OUTCOMES.c.row.desc())
        if labelled:
            newest = newest.where(OUTCOMES.c.labelled)
        return [outcome for _, outcome in reversed(self._read(newest.limit(limit)))]

    def count(self) -> int:
        """Number of outcomes in the store."""
        return self._scalar(sa.select(sa.func.count()).select_from(OUTCOMES))

    def labelled_count(self) -> int:
        """Number of outcomes in the store that have a quality label."""
        query = sa.select(sa.func.count()).select_from(OUTCOMES).where(OUTCOMES.c.labelled)
        return self._scalar(query)

    def labelled_total(self) -> int:
        """Number of outcomes that ever got a label; unlike `labelled_count` it never falls."""
        return int(self.meta("labelled_total") or 0)

    def prune(self, max_rows: int) -> int:
        """Delete all but the newest `max_rows` outcomes, and bound signals without an outcome.

        Returns the number of outcomes deleted.
        """
        newest_gone = _nth_newest(OUTCOMES, max_rows)
        known = sa.select(OUTCOMES.c.outcome_id)
        with self._guard("prune"), self._engine.begin() as connection:
            deleted = connection.execute(
                sa.delete(OUTCOMES).where(OUTCOMES.c.row <= newest_gone)
            ).rowcount
            connection.execute(
                sa.delete(SIGNALS).where(
                    SIGNALS.c.row <= _nth_newest(SIGNALS, max_rows),
                    SIGNALS.c.outcome_id.not_in(known),
                )
            )
        return deleted

    def meta(self, key: str) -> str | None:
        """A stored value, None when it was never set."""
        with self._guard("read"), self._engine.connect() as connection:
            found: str | None = connection.execute(
                sa.select(META.c.value).where(META.c.key == key)
            ).scalar()
            return found

    def set_meta(self, key: str, value: str) -> None:
        """Store a value under a key."""
        with self._guard("write"), self._engine.begin() as connection:
            self._write_meta(connection, key, value)

    def add_goal_change(self, change: GoalChange, configured: str | None) -> GoalChange:
        """Append to the audit trail and return the change with its revision.

        `configured` replaces what `configured_goals` returns, in the same transaction.
        """
        values = {"at": change.at, "by": change.by, "old": change.old, "new": change.new}
        with self._guard("write goals"), self._engine.begin() as connection:
            insert = sa.insert(GOAL_CHANGES).values(values).returning(GOAL_CHANGES.c.row)
            revision = int(connection.execute(insert).scalar_one())
            gone = GOAL_CHANGES.c.row <= revision - MAX_GOAL_CHANGES
            connection.execute(sa.delete(GOAL_CHANGES).where(gone))
            if configured is not None:
                self._write_meta(connection, "goals_configured", configured)
        return replace(change, revision=revision)

    def goal_changes(self, limit: int) -> list[GoalChange]:
        """The newest `limit` changes of the goals, newest first."""
        query = sa.select(GOAL_CHANGES).order_by(GOAL_CHANGES.c.row.desc()).limit(limit)
        with self._guard("read goals"), self._engine.connect() as connection:
            found = connection.execute(query).all()
        return [GoalChange(r.at, r.by, r.old, r.new, r.row) for r in found]

    def configured_goals(self) -> str | None:
        """The goals of the last deployment that changed them, None before the first."""
        return self.meta("goals_configured")

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _write_signals(
        self, connection: sa.Connection, signals: Sequence[tuple[str, QualitySignal]]
    ) -> None:
        insert = self._insert(SIGNALS)
        newer = insert.on_conflict_do_update(
            index_elements=["outcome_id", "source"],
            set_={"value": insert.excluded.value, "at": insert.excluded.at},
            where=insert.excluded.at >= SIGNALS.c.at,
        )
        for outcome_id, signal in signals:
            connection.execute(
                newer,
                {
                    "outcome_id": outcome_id,
                    "source": signal.source,
                    "value": signal.value,
                    "at": signal.at,
                },
            )

    def _mark_labelled(self, connection: sa.Connection, outcome_ids: Sequence[str]) -> None:
        """Set the flag of outcomes whose signals give a label, and count the new ones."""
        by_id = _signals_of(connection, outcome_ids)
        ids = [i for i, signals in by_id.items() if quality_label(signals)]
        marked = 0
        for chunk in _chunks(ids):
            unmarked = OUTCOMES.c.outcome_id.in_(chunk) & ~OUTCOMES.c.labelled
            update = sa.update(OUTCOMES).where(unmarked).values(labelled=True)
            marked += connection.execute(update).rowcount
        if marked:
            key = "labelled_total"
            old = connection.execute(
                sa.select(META.c.value).where(META.c.key == key).with_for_update()
            ).scalar()
            self._write_meta(connection, key, str(int(old or 0) + marked))

    def _write_meta(self, connection: sa.Connection, key: str, value: str) -> None:
        insert = self._insert(META).values(key=key, value=value)
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=["key"], set_={"value": insert.excluded.value}
            )
        )

    def _read(self, query: sa.Select[Any]) -> list[tuple[int, Outcome]]:
        with self._guard("read"), self._engine.connect() as connection:
            found = connection.execute(query).all()
            by_id = _signals_of(connection, [row.outcome_id for row in found])
        return [
            (row.row, from_columns(row._asdict(), by_id.get(row.outcome_id, ()))) for row in found
        ]

    def _scalar(self, query: sa.Select[Any]) -> int:
        with self._guard("count"), self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    @contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise KnowledgeError(
                f"{self._name}: no database driver ({error}); install calm-serve[postgres]"
            ) from error
        except (SQLAlchemyError, ValueError, TypeError, OverflowError) as error:
            # Only the error's first line: the rest repeats the statement and its parameters.
            first = str(error).strip().partition("\n")[0]
            raise KnowledgeError(f"{self._name}: cannot {what}: {first}") from error


def _engine(url: sa.URL) -> sa.Engine:
    # No NaN in JSON: PostgreSQL refuses it, and SQLite would store it.
    postgres = url.get_backend_name() == "postgresql"
    engine = sa.create_engine(
        url,
        json_serializer=partial(json.dumps, allow_nan=False),
        pool_pre_ping=True,
        connect_args={"connect_timeout": CONNECT_TIMEOUT_S} if postgres else {},
    )
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _tune_sqlite)
    return engine


def _tune_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.close()


def _nth_newest(table: sa.Table, n: int) -> sa.ScalarSelect[Any]:
    return sa.select(table.c.row).order_by(table.c.row.desc()).offset(n).limit(1).scalar_subquery()


def _signals_of(
    connection: sa.Connection, outcome_ids: Sequence[str]
) -> dict[str, list[QualitySignal]]:
    by_id: dict[str, list[QualitySignal]] = {}
    for chunk in _chunks(outcome_ids):
        query = sa.select(SIGNALS).where(SIGNALS.c.outcome_id.in_(chunk))
        for row in connection.execute(query.order_by(SIGNALS.c.row)):
            signal = QualitySignal(row.source, row.value, row.at)
            by_id.setdefault(row.outcome_id, []).append(signal)
    return by_id


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _CHUNK):
        yield ids[start : start + _CHUNK]
