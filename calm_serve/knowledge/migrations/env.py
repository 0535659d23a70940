"""Alembic runs this file; the caller passes its open connection and owns the transaction."""

from __future__ import annotations

from alembic import context

# Outside of Alembic the context has no configuration, and importing does nothing.
if (config := getattr(context, "config", None)) is not None:
    context.configure(connection=config.attributes["connection"], transactional_ddl=False)
    context.run_migrations()
