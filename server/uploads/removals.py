"""Removes the objects of deleted files, and of failed and expired uploads, from the artifact store.

Guarantees: an object that is recorded in `object_removals` is removed as soon as the store responds, also if the server
is killed in the meantime. Removing it again is harmless.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import PurePosixPath

from server.artifacts import Artifacts
from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.database.object_removals import due_removals, postpone_removal, removal_done

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
                await asyncio.to_thread(artifacts.remove, PurePosixPath(key))
            except OSError:
                await postpone_removal(database, key)
                raise
            await removal_done(database, key)
