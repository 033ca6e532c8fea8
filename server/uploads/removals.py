"""Removes objects of deleted files, of failed or expired uploads, and of checkpoints that ended jobs have left behind.
Guarantees: an object that is recorded in `object_removals` is removed as soon as the store responds, even if the server
is killed in the meantime. Removing it again is harmless. The checkpoints of an ended job that have no row are those
that its workers could not remove, or did not store completely; an ended job stores no more checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from sqlalchemy import select

from server.artifacts import Artifacts
from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.database.object_removals import due_removals, job_of_removal, postpone_removal, removals_done
from server.database.tables import CheckpointRow

PACE_SECONDS = 10.0

logger = logging.getLogger(__name__)


async def remove_now(database: Database, artifacts: Artifacts, key: PurePosixPath) -> None:
    """Remove an object that is due; if that fails, `remove_due` repeats it, so no error is raised."""
    try:
        if await asyncio.to_thread(artifacts.discard, key):
            await removals_done(database, [str(key)])
    except DatabaseUnavailable as error:
        logger.warning("The removal of %s will be repeated: %s", key, error, extra={"action": "removal"})


async def remove_due(database: Database, artifacts: Artifacts) -> None:
    """Remove all due objects. Raises `OSError` if one can't be removed; the next call tries all others first."""
    while keys := await due_removals(database):
        keep = await _recorded_checkpoints(database, [job_id for key in keys if (job_id := job_of_removal(key))])
        removed: list[str] = []
        for key in keys:
            try:
                await asyncio.to_thread(_remove, artifacts, key, keep)
            except OSError:
                await removals_done(database, removed)
                await postpone_removal(database, key)
                raise
            removed.append(key)
        await removals_done(database, removed)


async def _recorded_checkpoints(database: Database, job_ids: Sequence[str]) -> Mapping[str, set[str]]:
    """The names of the checkpoints that have a row, by job."""
    names = {job_id: set[str]() for job_id in job_ids}
    if job_ids:
        query = select(CheckpointRow.job_id, CheckpointRow.name).where(CheckpointRow.job_id.in_(job_ids))
        async with database.read() as session:
            for job_id, name in await session.execute(query):
                names[job_id].add(name)
    return names


def _remove(artifacts: Artifacts, key: str, keep: Mapping[str, Collection[str]]) -> None:
    """Remove the object, or the checkpoints of a job except those in ``keep``."""
    job_id = job_of_removal(key)
    if job_id is None:
        artifacts.remove(PurePosixPath(key))
    else:
        artifacts.remove_checkpoints(job_id, keep=keep[job_id])
