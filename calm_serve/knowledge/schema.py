"""The store's tables. The columns of an outcome follow from the fields of `types.Outcome`."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import sqlalchemy as sa

from calm_serve.knowledge.codec import COLUMNS
from calm_serve.types import Outcome

_TYPES: dict[Any, Any] = {
    str: sa.Text,
    int: sa.Integer,
    bool: sa.Boolean,
    float: sa.Float(53),  # double precision
}


def _outcome_columns() -> list[sa.Column[Any]]:
    hints = get_type_hints(Outcome)
    columns = []
    for name in COLUMNS:
        kinds = get_args(hints[name])
        optional = type(None) in kinds
        kind = next(k for k in kinds if k is not type(None)) if optional else hints[name]
        # Tuples and dicts have no column type of their own: JSON keeps every float exactly.
        sql_type = _TYPES.get(kind, sa.JSON)
        columns.append(sa.Column(name, sql_type, nullable=optional, unique=name == "outcome_id"))
    return columns


METADATA = sa.MetaData()
_ROW = sa.BigInteger().with_variant(sa.Integer, "sqlite")
OUTCOMES = sa.Table(
    "outcomes",
    METADATA,
    sa.Column("row", _ROW, primary_key=True, autoincrement=True),
    *_outcome_columns(),
    sa.Column("labelled", sa.Boolean, nullable=False),
    sa.Index("outcomes_at", "at", "row"),
    sa.Index("outcomes_labelled", "labelled", "row"),
    sqlite_autoincrement=True,
)
# One row per source: a later statement replaces an earlier one, so signals cannot pile up.
SIGNALS = sa.Table(
    "signals",
    METADATA,
    sa.Column("row", _ROW, primary_key=True, autoincrement=True),
    sa.Column("outcome_id", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("value", sa.Float(53), nullable=False),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.UniqueConstraint("outcome_id", "source"),
    sqlite_autoincrement=True,
)
GOAL_CHANGES = sa.Table(
    "goal_changes",
    METADATA,
    sa.Column("row", _ROW, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("old", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("new", sa.JSON, nullable=False),
    sqlite_autoincrement=True,
)
META = sa.Table(
    "meta",
    METADATA,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
