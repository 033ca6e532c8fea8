"""Checks that the database has the schema revision that this server needs; otherwise the server refuses to start."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sqlalchemy import column, select, table, text
from sqlalchemy.exc import SQLAlchemyError

from server.database.availability import first_line
from server.database.connections import Database
from zeta_core.contract.errors import InvalidSettings, Unavailable
from zeta_core.system.database_url import DatabaseAddress

SCHEMA_REVISION = "0026"  # of the latest migration (checked by a test)
_VERSION = table("alembic_version", column("version_num"))


async def require_schema(database: Database) -> None:
    """Raise `InvalidSettings` for another schema revision, and `Unavailable` if the database can't be opened."""
    revision = await _revision(database)
    if revision == SCHEMA_REVISION:
        return
    if revision is not None and revision > SCHEMA_REVISION:
        raise schema_too_new(revision, SCHEMA_REVISION)
    raise InvalidSettings(
        f"The database is at revision {revision or 'none'} and this server needs {SCHEMA_REVISION}; "
        "run `zeta migrate`.",
        code="schema_too_old",
    )


def schema_too_new(revision: str, latest: str) -> InvalidSettings:
    return InvalidSettings(
        f"The database is at revision {revision}, which this version doesn't know (its latest is {latest}). "
        "Nothing was changed; upgrade zeta-train.",
        code="schema_too_new",
    )


def cannot_open(address: DatabaseAddress, error: Exception) -> Unavailable:
    """The error for any failure of the driver or the file system while opening the database."""
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return Unavailable(f"The database {address.location} (ZETA_DATABASE_URL) cannot be opened: {reason}.")


async def _revision(database: Database) -> str | None:
    try:
        if database.is_sqlite and not await asyncio.to_thread(Path(database.address.database).exists):
            return None  # connecting would create an empty file
        async with database.read() as session:
            await session.execute(text("SELECT count(*) FROM sqlite_master" if database.is_sqlite else "SELECT 1"))
    except (SQLAlchemyError, Unavailable, OSError, ValueError) as error:
        raise cannot_open(database.address, error) from error
    try:
        async with database.read() as session:
            return await session.scalar(select(_VERSION.c.version_num))
    except (SQLAlchemyError, Unavailable):  # the table doesn't exist
        return None
