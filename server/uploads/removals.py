"""Removes objects from the artifact store: those of deleted files, failed and expired uploads, and left checkpoints.

Guarantees: an object that is recorded in `object_removals` is removed as soon as the store responds, even if the server
is killed in the meantime. Removing it again is harmless. The checkpoints of an ended job that have no row are those
that its workers could not remove, or did not store completely; an ended job stores no more checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import PurePosixPath

from sqlalchemy import select

from server.artifacts import Artifacts
from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.database.object_removals import due_removals, job_of_removal, postpone_removal, removal_done
from server.database.tables import CheckpointRow

PACE_SECONDS = 10.0

logger = logging.getLogger(__name__)


async def remove_now(database: Database, artifacts: Artifacts, key: PurePosixPath) -> None:
    """Remove an object that is due; if that fails, `remove_due` repeats it, so no error is raised."""
    try:
        if await asyncio.to_thread(artifacts.discard, key):
            await removal_done(database, str(key))
    except DatabaseUnavailable as error:
        logger.warning("The removal of %s will be repeated: %s", key, error, extra={"action": "removal"})


async def remove_due(database: Database, artifacts: Artifacts) -> None:
    """Remove all due objects. Raises `OSError` if one can't be removed; the next call tries all others first."""
    while keys := await due_removals(database):
        for key in keys:
            try:
                await _remove(database, artifacts, key)
            except OSError:
                await postpone_removal(database, key)
                raise
            await removal_done(database, key)


async def _remove(database: Database, artifacts: Artifacts, key: str) -> None:
    job_id = job_of_removal(key)
    if job_id is None:
        await asyncio.to_thread(artifacts.remove, PurePosixPath(key))
        return
    async with database.read() as session:
        recorded = set(await session.scalars(select(CheckpointRow.name).where(CheckpointRow.job_id == job_id)))
    await asyncio.to_thread(artifacts.remove_checkpoints, job_id, keep=recorded)
