"""Brings a database to the newest revision.

Guarantees: an upgrade is one transaction, so one that fails or is killed leaves the old schema whole; two at once wait
for each other, and the second finds nothing to do. A SQLite database that holds data is first copied, whole and
consistent, to ``<file>.before-<new revision>`` beside it. A database at a revision that this version does not know (a
newer version upgraded it) is reported and left as it is.
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

from server.database.db import postgres_arguments
from server.database.schema import cannot_open, schema_too_new
from zeta_core.contract.database_url import DatabaseAddress

logger = logging.getLogger(__name__)

LOCK_NUMBER = 0x7A657461  # "zeta": the advisory lock that migrations of one PostgreSQL database take
BUSY_TIMEOUT_SECONDS = 30


def upgrade(url: str) -> str:
    """Upgrade the database of ``url`` to the newest revision, whose name is returned.

    Raises `Unavailable` where it cannot be opened, `InvalidSettings` where a newer version has upgraded it.
    """
    address = DatabaseAddress.parse(url)
    head = newest_revision()
    try:
        if address.backend == "sqlite":
            _require_known(_revision_of_file(Path(address.database)))
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
        _require_known(current)
        if address.backend == "sqlite" and current is not None and current != head:
            _copy(Path(address.database), head)
        with connection.begin():
            if address.backend == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": LOCK_NUMBER})
            command.upgrade(_configuration(connection), "head")
    return current


def _require_known(revision: str | None) -> None:
    scripts = ScriptDirectory.from_config(_configuration(None))
    if revision is not None and revision not in {script.revision for script in scripts.walk_revisions()}:
        raise schema_too_new(revision, newest_revision())


def _revision_of_file(database: Path) -> str | None:
    """The revision of a SQLite file, read without changing the file or anything beside it; ``None`` without one."""
    if not database.is_file():
        return None
    # Without a write-ahead log nobody has it open; reading it as immutable then creates no log either.
    how = "mode=ro" if database.with_name(f"{database.name}-wal").exists() else "immutable=1"
    uri = f"file:{quote(os.fsencode(database.absolute()))}?{how}"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_SECONDS)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def newest_revision() -> str:
    """The revision that the newest migration builds."""
    head = ScriptDirectory.from_config(_configuration(None)).get_current_head()
    assert head is not None, "there is no migration"
    return head


def _configuration(connection: Connection | None) -> Config:
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    configuration.attributes["connection"] = connection
    return configuration


def _engine(address: DatabaseAddress) -> Engine:
    """An engine with an ordinary driver, whose SQLite transactions hold DDL too."""
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


def _copy(database: Path, head: str) -> None:
    target = database.with_name(f"{database.name}.before-{head}")
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    source, copy = sqlite3.connect(database), sqlite3.connect(partial)
    try:
        source.backup(copy)
    finally:
        copy.close()
        source.close()
    partial.replace(target)
    logger.info("The database was copied to %s before its upgrade.", target)
