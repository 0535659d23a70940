"""Migrations of the outcome store. Owner: knowledge actor, command line. May block.

Alembic, run in process: `upgrade` brings a store of any earlier program to the present schema, in
one transaction, or refuses a store that a newer program wrote without touching it.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from calm_serve.errors import KnowledgeError

# Version of the schema of programs before the first migration; they wrote it into the table `meta`.
UNVERSIONED = "1"
LOCK_ID = 0x0CA1_5E4E  # PostgreSQL advisory lock during a migration
FOLDER = Path(__file__).parent


def refuse_newer(url: sa.URL) -> None:
    """Raise KnowledgeError for a store of a newer program, before anything is written to it."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)  # without the store's own settings
    with engine.connect() as connection:
        _refuse_newer(_config(), connection)


def upgrade(engine: sa.Engine) -> None:
    """Create the tables, or bring them to the newest schema.

    Raises KnowledgeError for a store of a newer program. Two processes that open a store at once
    migrate it one after the other; the second one finds nothing to do.
    """
    config = _config()
    with engine.connect() as connection:
        if _revision(connection) == _newest(config):
            return
    with engine.connect() as connection, connection.begin():
        _lock(connection)
        _refuse_newer(config, connection)
        config.attributes["connection"] = connection
        if _revision(connection) is None and _unversioned(connection) is not None:
            command.stamp(config, UNVERSIONED)
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    return config


def _newest(config: Config) -> str | None:
    return ScriptDirectory.from_config(config).get_current_head()


def _revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(config: Config, connection: sa.Connection) -> None:
    revision, known = _revision(connection), {UNVERSIONED}
    if revision is not None:
        scripts = ScriptDirectory.from_config(config).walk_revisions()
        known = {script.revision for script in scripts}
    found = revision or _unversioned(connection)
    if found is not None and found not in known:
        raise KnowledgeError(
            f"the store has schema {found}, which a newer program wrote; it was left untouched"
        )


def _unversioned(connection: sa.Connection) -> str | None:
    """Schema version of a store from before the first migration, None for an empty database."""
    if not sa.inspect(connection).has_table("meta"):
        return None
    query = sa.text("SELECT value FROM meta WHERE key = 'schema_version'")
    found: str | None = connection.execute(query).scalar()
    return found


def _lock(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})
    else:
        # sqlite3 begins no transaction before DDL by itself; without one a crash would leave half a
        # migration.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
