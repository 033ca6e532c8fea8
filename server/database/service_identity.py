"""Identifies the service that a database belongs to, so that a copy of the database becomes a different service.

The service id is created at the first start and stored with the identity of the database: the inode of the SQLite file,
or the system identifier of the PostgreSQL cluster and the oid of the database. A restored backup or a clone has another
identity and gets a new service id before the server does anything else. Two kinds of copies can't be detected: a
physical copy of a whole PostgreSQL cluster, and a machine image that is started on another machine.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database
from server.database.tables import ServiceRow
from zeta_core.contract.identifiers import new_id
from zeta_core.system.file_identity import FileIdentity

ONLY_ROW = 1

logger = logging.getLogger(__name__)


async def identify_service(database: Database) -> str:
    """The id of the service that this database belongs to; a new database, or a copy of one, gets a new id."""
    identity = await _database_identity(database)
    async with database.read() as session:
        row = await session.get(ServiceRow, ONLY_ROW)
    if row is not None and row.database == identity:
        return row.id
    try:
        async with database.write() as session:
            return await _identify(session, identity)
    except IntegrityError:  # another server inserted the row concurrently
        async with database.write() as session:
            return await _identify(session, identity)


async def read_service_id(database: Database) -> str | None:
    """The id of the service that last used this database, which is not changed; ``None`` if no service has used it."""
    async with database.read() as session:
        row = await session.get(ServiceRow, ONLY_ROW)
    return None if row is None else row.id


async def _identify(session: AsyncSession, identity: str) -> str:
    row = await session.get(ServiceRow, ONLY_ROW, with_for_update=True)
    if row is None:
        row = ServiceRow(number=ONLY_ROW, id=new_id("svc"), database=identity)
        session.add(row)
        await session.flush()
    elif row.database != identity:
        if not _is_same(row.database, identity):
            former, row.id = row.id, new_id("svc")
            row.claim, row.claimed_by = None, None
            logger.warning(
                "The database was copied or moved since its last start; the service id is now %s (was %s).",
                row.id,
                former,
                extra={"action": "new_service_id"},
            )
        row.database = identity
    return row.id


def _is_same(recorded: str, identity: str) -> bool:
    before, now = FileIdentity.parse(recorded), FileIdentity.parse(identity)
    return before is not None and now is not None and before.is_same_file(now)


async def _database_identity(database: Database) -> str:
    if database.is_sqlite:
        return await asyncio.to_thread(_file_identity, Path(database.address.database))
    async with database.read() as session:
        oid = await session.scalar(text("SELECT oid FROM pg_database WHERE datname = current_database()"))
    try:
        async with database.read() as session:
            cluster = await session.scalar(text("SELECT system_identifier FROM pg_control_system()"))
    except DBAPIError:
        cluster = "unknown"  # this account has no permission
    return f"postgresql {cluster} {oid}"


def _file_identity(file: Path) -> str:
    return str(FileIdentity.of(file)) if file.is_file() else "memory"
