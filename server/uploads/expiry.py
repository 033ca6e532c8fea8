"""Removes uploads in parts that were not completed in time, with their parts."""

from __future__ import annotations

import asyncio

from sqlalchemy import delete, select

from server.artifacts import Artifacts, parts_key
from server.database.connections import Database
from server.database.tables import UploadRow
from zeta_core.contract.job.events import utc_now

EXPIRY_SECONDS = 300.0  # between removals
MAX_UPLOADS = 100  # per removal


async def remove_expired(database: Database, artifacts: Artifacts) -> None:
    """Remove the parts of expired uploads, then their rows, so that an interrupted removal is repeated."""
    expired = select(UploadRow.id).where(UploadRow.expires_at < utc_now()).order_by(UploadRow.expires_at)
    async with database.read() as session:
        ids = list(await session.scalars(expired.limit(MAX_UPLOADS)))
    for upload_id in ids:
        await asyncio.to_thread(artifacts.remove, parts_key(upload_id))
        async with database.write() as session:
            await session.execute(delete(UploadRow).where(UploadRow.id == upload_id))
