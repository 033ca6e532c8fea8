"""Removes uploads in parts that were not completed in time, with their parts."""

from __future__ import annotations

from sqlalchemy import delete, select

from server.artifacts import Artifacts, parts_key
from server.database.connections import Database
from server.database.file_tables import UploadRow
from server.database.object_removals import request_removal
from server.uploads.removals import remove_now
from zeta_core.contract.job.events import utc_now

EXPIRY_SECONDS = 300.0  # between removals
MAX_UPLOADS = 100  # per removal


async def remove_expired(database: Database, artifacts: Artifacts) -> None:
    """Remove expired uploads and their parts. A part that arrives at the same time renews its upload."""
    is_expired = UploadRow.expires_at < utc_now()
    async with database.read() as session:
        expired = select(UploadRow.id).where(is_expired).order_by(UploadRow.expires_at)
        ids = list(await session.scalars(expired.limit(MAX_UPLOADS)))
    for upload_id in ids:
        parts = parts_key(upload_id)
        async with database.write() as session:
            removed = delete(UploadRow).where(UploadRow.id == upload_id, is_expired).returning(UploadRow.id)
            if (await session.execute(removed)).first() is None:
                continue
            await request_removal(session, str(parts))
        await remove_now(database, artifacts, parts)
