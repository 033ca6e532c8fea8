"""Brings a database to the newest revision.

Guarantees: an upgrade is one transaction, so one that fails or is killed leaves the old schema whole; two at once wait
for each other, and the second finds nothing to do. A SQLite database that holds data is first copied, whole and
consistent, to ``<file>.before-<new revision>`` beside it.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import OperationalError

from server.database.db import async_url
from zeta_core.contract.errors import Unavailable

logger = logging.getLogger(__name__)

LOCK_NUMBER = 0x7A657461  # "zeta": the advisory lock that migrations of one PostgreSQL database take
BUSY_TIMEOUT_SECONDS = 30


def upgrade(url: str) -> str:
    """Upgrade the database of ``url`` to the newest revision, whose name is returned; raises `Unavailable`."""
    engine = _engine(url)
    head = newest_revision()
    try:
        with engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
            connection.rollback()
            if engine.dialect.name == "sqlite" and current is not None and current != head:
                _copy(Path(make_url(url).database or ""), head)
            with connection.begin():
                if engine.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": LOCK_NUMBER})
                command.upgrade(_configuration(connection), "head")
    except OperationalError as error:
        shown = make_url(url).render_as_string(hide_password=True)
        reason = str(error.orig).strip().splitlines()[0]
        raise Unavailable(f"ZETA_DATABASE_URL is {shown!r}, which cannot be opened: {reason}.") from error
    finally:
        engine.dispose()
    if current == head:
        logger.info("The database is at revision %s already.", head)
    else:
        logger.info("The database went from revision %s to %s.", current or "none", head)
    return head


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


def _engine(url: str) -> Engine:
    """An engine with an ordinary driver, whose SQLite transactions hold DDL too."""
    parsed = make_url(async_url(url))
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed)
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = create_engine(
        parsed.set(drivername="sqlite"), connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None}
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
