"""Novelty of a prompt, and the hashes that it is computed from; unknown for older outcomes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"

_META = sa.table("meta", sa.column("key", sa.Text), sa.column("value", sa.Text))


def upgrade() -> None:
    """Add the columns."""
    op.add_column("outcomes", sa.Column("bits", sa.JSON, nullable=False, server_default="[]"))
    op.add_column("outcomes", sa.Column("novelty", sa.JSON(none_as_null=True), nullable=True))
    # Programs without migrations read the version here, and refuse a newer one.
    version = sa.update(_META).where(_META.c.key == "schema_version").values(value=revision)
    op.get_bind().execute(version)
