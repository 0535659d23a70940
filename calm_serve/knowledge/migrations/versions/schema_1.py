"""The schema of the first programs: flat outcomes with an untyped `extra`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None

_ROW = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_DOUBLE = sa.Float(53)


def upgrade() -> None:
    """Create the four tables."""
    op.create_table(
        "outcomes",
        sa.Column("row", _ROW, primary_key=True, autoincrement=True),
        *(sa.Column(name, kind, nullable=nullable) for name, kind, nullable in _OUTCOME),
        sa.Column("labelled", sa.Boolean, nullable=False),
        sa.UniqueConstraint("outcome_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("outcomes_at", "outcomes", ["at", "row"])
    op.create_index("outcomes_labelled", "outcomes", ["labelled", "row"])
    op.create_table(
        "signals",
        sa.Column("row", _ROW, primary_key=True, autoincrement=True),
        sa.Column("outcome_id", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("value", _DOUBLE, nullable=False),
        sa.Column("at", _DOUBLE, nullable=False),
        sa.UniqueConstraint("outcome_id", "source"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "goal_changes",
        sa.Column("row", _ROW, primary_key=True, autoincrement=True),
        sa.Column("at", _DOUBLE, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("old", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("new", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )


_OUTCOME: tuple[tuple[str, Any, bool], ...] = (
    ("outcome_id", sa.Text, False),
    ("at", _DOUBLE, False),
    ("slm_id", sa.Text, False),
    ("adapter", sa.Text, False),
    ("path", sa.Text, False),
    ("reason", sa.Text, False),
    ("rule", sa.Text, False),
    ("propensity", _DOUBLE, False),
    ("status", sa.Text, False),
    ("http_status", sa.Integer, False),
    ("retries", sa.Integer, False),
    ("predicted_replica", sa.Text, False),
    ("served_replica", sa.Text, False),
    ("cold", sa.Boolean, False),
    ("ttft_s", _DOUBLE, True),
    ("e2e_s", _DOUBLE, True),
    ("tpot_s", _DOUBLE, True),
    ("decision_s", _DOUBLE, False),
    ("prompt_tokens", sa.Integer, False),
    ("cached_tokens", sa.Integer, False),
    ("output_tokens", sa.Integer, False),
    ("energy_j", _DOUBLE, True),
    ("energy_source", sa.Text, False),
    ("task", sa.Text, False),
    ("numbers", sa.JSON, False),
    ("buckets", sa.JSON, False),
    ("load", sa.JSON, False),
    ("predicted", sa.JSON, False),
    ("versions", sa.JSON, False),
    ("prompt", sa.Text, True),
    ("queue_s", _DOUBLE, True),
    ("extra", sa.JSON, False),
)
