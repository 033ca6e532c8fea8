"""Upgrades a database to the latest schema revision.

Guarantees: an upgrade is one transaction, so the old schema stays intact if the upgrade fails or is killed. Concurrent
upgrades run one after the other, and the second finds nothing to do. A SQLite database with data is first backed up to
``<file>.before-<new revision>`` in the same folder. If the database has an unknown revision, because a newer version
upgraded it, an error is raised and nothing is changed.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError

from server.database.connections import postgres_arguments
from server.database.schema import cannot_open, schema_too_new
from zeta_core.system.database_url import DatabaseAddress
from zeta_core.system.durable_files import rename_durably

logger = logging.getLogger(__name__)

LOCK_NUMBER = 0x7A657461  # "zeta": the advisory lock that migrations of one PostgreSQL database take
BUSY_TIMEOUT_SECONDS = 30


def upgrade(url: str) -> str:
    """Upgrade the database at ``url`` to the latest revision and return that revision.

    Raises `Unavailable` if it cannot be opened, and `InvalidSettings` if a newer version has upgraded it.
    """
    address = DatabaseAddress.parse(url)
    head = latest_revision()
    try:
        if address.backend == "sqlite":
            _require_known_revision(_revision_of_file(Path(address.database)))
        engine = _engine(address)
        try:
            current = _upgrade(engine, address, head)
        finally:
            engine.dispose()
    except (SQLAlchemyError, sqlite3.Error, OSError, ValueError) as error:
        raise cannot_open(address, error) from error
    if current == head:
        logger.info("The database is already at revision %s.", head)
    else:
        logger.info("Upgraded the database from revision %s to %s.", current or "none", head)
    return head


def _upgrade(engine: Engine, address: DatabaseAddress, head: str) -> str | None:
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        connection.rollback()
        _require_known_revision(current)
        if address.backend == "sqlite" and current is not None and current != head:
            _back_up(Path(address.database), head)
        with connection.begin():
            if address.backend == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": LOCK_NUMBER})
            command.upgrade(_configuration(connection), "head")
    return current


def _require_known_revision(revision: str | None) -> None:
    scripts = ScriptDirectory.from_config(_configuration(None))
    if revision is not None and revision not in {script.revision for script in scripts.walk_revisions()}:
        raise schema_too_new(revision, latest_revision())


def _revision_of_file(database: Path) -> str | None:
    """The revision of a SQLite file, or ``None``. Reading it changes no file and creates none."""
    if not database.is_file():
        return None
    # Without a write-ahead log the database is not in use, and immutable mode prevents creating a log.
    mode = "mode=ro" if database.with_name(f"{database.name}-wal").exists() else "immutable=1"
    uri = f"file:{quote(os.fsencode(database.absolute()))}?{mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_SECONDS)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def latest_revision() -> str:
    """The revision of the latest migration."""
    head = ScriptDirectory.from_config(_configuration(None)).get_current_head()
    assert head is not None, "there is no migration"
    return head


def _configuration(connection: Connection | None) -> Config:
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    configuration.attributes["connection"] = connection
    return configuration


def _engine(address: DatabaseAddress) -> Engine:
    """A synchronous engine, whose SQLite transactions include DDL statements."""
    if address.backend == "postgresql":
        return create_engine(URL.create("postgresql+psycopg"), connect_args=postgres_arguments(address))
    Path(address.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = create_engine(
        URL.create("sqlite", database=address.database),
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _back_up(database: Path, head: str) -> None:
    target = database.with_name(f"{database.name}.before-{head}")
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    source, backup = sqlite3.connect(database), sqlite3.connect(partial)
    try:
        source.backup(backup)
    finally:
        backup.close()
        source.close()
    rename_durably(partial, target)  # SQLite has flushed it
    logger.info("Backed up the database to %s before the upgrade.", target)
