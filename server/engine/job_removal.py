"""Removes the data of deleted jobs.

A deletion first commits a mark (`JobRow.deleted_at`), which hides the job from all users. Then its artifacts and
finally its rows are removed. Guarantees: a removal that was interrupted by a killed server or a disk error is repeated
at the next server start and at regular intervals; repeating it is safe.
"""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy import delete, select

from server.artifacts import Artifacts
from server.database.connections import Database
from server.database.tables import EventRow, JobRow
from server.engine.loops import raise_first, try_each

RETRY_SECONDS = 600.0
CHUNK_EVENTS = 5000  # removed per transaction, so that other writers don't wait long

logger = logging.getLogger(__name__)


async def remove_deleted(database: Database, artifacts: Artifacts, job_id: str) -> None:
    """Remove a marked job's artifacts, then its rows. A disk error is logged, and the removal is retried later."""
    try:
        await asyncio.to_thread(artifacts.remove_job, job_id)
    except OSError as error:
        logger.warning("The artifacts of the deleted job %s cannot be removed now: %s", job_id, error)
        return
    async with database.read() as session:
        last_seq = await session.scalar(select(JobRow.last_seq).where(JobRow.id == job_id)) or 0
    for upto in range(CHUNK_EVENTS, last_seq, CHUNK_EVENTS):
        async with database.write() as session:
            await session.execute(delete(EventRow).where(EventRow.job_id == job_id, EventRow.seq <= upto))
    async with database.write() as session:
        await session.execute(delete(JobRow).where(JobRow.id == job_id, JobRow.deleted_at.is_not(None)))
    logger.info("Deleted %s.", job_id, extra={"action": "delete", "job_id": job_id})


async def finish_deletions(database: Database, artifacts: Artifacts) -> None:
    """Finish all interrupted deletions."""
    async with database.read() as session:
        left = list(await session.scalars(select(JobRow.id).where(JobRow.deleted_at.is_not(None))))

    async def finish(job_id: str) -> None:
        await remove_deleted(database, artifacts, job_id)

    raise_first(await try_each(left, finish))
