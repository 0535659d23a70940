"""Outcomes say why a request failed, which SLMs were asked in vain, and what it cost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"

_META = sa.table("meta", sa.column("key", sa.Text), sa.column("value", sa.Text))


def upgrade() -> None:
    """Add the columns, empty in the rows that exist."""
    for column in (
        sa.Column("failure", sa.Text, nullable=False, server_default=""),
        sa.Column("failed_attempts", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("cost", sa.Float(53), nullable=True),
        sa.Column("currency", sa.Text, nullable=False, server_default=""),
    ):
        op.add_column("outcomes", column)
    # Programs without migrations read the version here, and refuse a newer one.
    version = sa.update(_META).where(_META.c.key == "schema_version").values(value=revision)
    op.get_bind().execute(version)
