"""Whether the database has the schema that this server was written for; nothing is served on another one."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import column, make_url, select, table
from sqlalchemy.exc import OperationalError, ProgrammingError

from server.database.db import Database
from zeta_core.contract.errors import InvalidSettings, Unavailable

SCHEMA_REVISION = "0005"  # of the newest migration (a test compares them)
_VERSION = table("alembic_version", column("version_num"))


async def require_schema(database: Database) -> None:
    """Raise `InvalidSettings` with the command to run if the schema is another one, `Unavailable` if none answers."""
    found = await _revision(database)
    if found == SCHEMA_REVISION:
        return
    if found is not None and found > SCHEMA_REVISION:
        raise InvalidSettings(
            f"The database is at revision {found}, which is newer than this server's {SCHEMA_REVISION}; "
            "upgrade the server.",
            code="schema_too_new",
        )
    raise InvalidSettings(
        f"The database is at revision {found or 'none'} and this server needs {SCHEMA_REVISION}; run `zeta migrate`.",
        code="schema_too_old",
    )


async def _revision(database: Database) -> str | None:
    if database.is_sqlite and not _exists(database.url):
        return None  # connecting would create an empty one
    try:
        async with database.read() as session:
            await session.execute(select(1))
    except OperationalError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise Unavailable(f"The database of ZETA_DATABASE_URL cannot be opened: {reason}.") from error
    try:
        async with database.read() as session:
            return await session.scalar(select(_VERSION.c.version_num))
    except (OperationalError, ProgrammingError):  # there is no such table
        return None


def _exists(sqlite_url: str) -> bool:
    return Path(make_url(sqlite_url).database or "").is_file()
