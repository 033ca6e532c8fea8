"""Which service a database belongs to: an id that a copy of the database does not keep.

The id is made at the first start and stored together with what identifies the database where it is: the file of SQLite
(its inode), or the cluster and the database's oid in PostgreSQL. A restored backup or a clone is found elsewhere, and
gets a new id before it does anything. Not recognized is a physical copy of a whole PostgreSQL cluster, and an image of
a whole machine that is started on another one.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.db import Database
from server.database.tables import ServiceRow
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.identity import FileIdentity

ONLY_ROW = 1

logger = logging.getLogger(__name__)


async def identify_service(database: Database) -> str:
    """The id of the service that this database belongs to, made or renewed where that is necessary."""
    here = await _whereabouts(database)
    async with database.read() as session:
        row = await session.get(ServiceRow, ONLY_ROW)
    if row is not None and row.database == here:
        return row.id
    try:
        async with database.write() as session:
            return await _identify(session, here)
    except IntegrityError:  # another server made the row at the same moment
        async with database.write() as session:
            return await _identify(session, here)


async def _identify(session: AsyncSession, here: str) -> str:
    row = await session.get(ServiceRow, ONLY_ROW, with_for_update=True)
    if row is None:
        row = ServiceRow(number=ONLY_ROW, id=new_id("svc"), database=here)
        session.add(row)
        await session.flush()
    elif row.database != here:
        if not _is_same(row.database, here):
            former, row.id = row.id, new_id("svc")
            logger.warning(
                "The database was copied or moved since its last start: this service is %s now, and %s no longer.",
                row.id,
                former,
                extra={"action": "new_service_id"},
            )
        row.database = here
    return row.id


def _is_same(recorded: str, here: str) -> bool:
    before, now = FileIdentity.parse(recorded), FileIdentity.parse(here)
    return before is not None and now is not None and before.is_same_file(now)


async def _whereabouts(database: Database) -> str:
    if database.is_sqlite:
        return await asyncio.to_thread(_identity_of, Path(database.address.database))
    async with database.read() as session:
        oid = await session.scalar(text("SELECT oid FROM pg_database WHERE datname = current_database()"))
    try:
        async with database.read() as session:
            cluster = await session.scalar(text("SELECT system_identifier FROM pg_control_system()"))
    except DBAPIError:
        cluster = "unknown"  # this account may not ask
    return f"postgresql {cluster} {oid}"


def _identity_of(file: Path) -> str:
    return str(FileIdentity.of(file)) if file.is_file() else "memory"
