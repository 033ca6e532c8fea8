"""Removes what deleted jobs have stored.

A deletion commits a mark first (`JobRow.deleted_at`), from which on the job is gone for everybody. Then its artifacts
are removed, then its rows. Guaranteed: what was cut short there, by a killed server or a disk that refuses, is done
again by the next start of a server and by a look now and then; repeating it is harmless.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from sqlalchemy import delete, select

from server.artifacts import ArtifactStore
from server.database.db import Database
from server.database.tables import EventRow, JobRow
from server.engine.keeper import DATABASE_AWAY

LOOK_SECONDS = 600.0
CHUNK_EVENTS = 5000  # removed in one transaction: others want to write too

logger = logging.getLogger(__name__)


async def remove_deleted(database: Database, store: ArtifactStore, job_id: str) -> None:
    """Remove a marked job's artifacts, then its rows. A disk that refuses is told in the log, and tried again later."""
    try:
        await asyncio.to_thread(store.remove_job, job_id)
    except OSError as error:
        logger.warning("The artifacts of the deleted %s cannot be removed now: %s", job_id, error)
        return
    async with database.read() as session:
        last_seq = await session.scalar(select(JobRow.last_seq).where(JobRow.id == job_id)) or 0
    for upto in range(CHUNK_EVENTS, last_seq, CHUNK_EVENTS):
        async with database.write() as session:
            await session.execute(delete(EventRow).where(EventRow.job_id == job_id, EventRow.seq <= upto))
    async with database.write() as session:
        await session.execute(delete(JobRow).where(JobRow.id == job_id, JobRow.deleted_at.is_not(None)))
    logger.info("%s is deleted.", job_id, extra={"action": "delete", "job_id": job_id})


async def finish_deletions(database: Database, store: ArtifactStore, stopping: asyncio.Event) -> None:
    """Finish every deletion that was cut short, now and every `LOOK_SECONDS`, until told to stop."""
    while not stopping.is_set():
        try:
            async with database.read() as session:
                left = list(await session.scalars(select(JobRow.id).where(JobRow.deleted_at.is_not(None))))
            for job_id in left:
                await remove_deleted(database, store, job_id)
        except DATABASE_AWAY as error:
            logger.warning("What deleted jobs have left cannot be removed now: %s", error)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await stopping.wait()
