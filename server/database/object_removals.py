"""Objects of the artifact store that are to be removed, recorded before anything is stored or removed.

An object and its row can't change in one transaction: a server may be killed, or the store may fail, in between.
Guarantees: every object of an upload has a row of its own (`FileRow` or `UploadPartRow`) or is recorded here, so no
object is forgotten. An object that is due here has no row, so no object that is needed is removed.

Workers store and remove the checkpoints of a job while it runs. Therefore, the end of a job is recorded here, too: the
server then removes the checkpoints that its workers could not remove.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import PurePosixPath

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from server.database.connections import Database
from server.database.tables import Table
from zeta_core.contract.errors import Unavailable
from zeta_core.contract.job.events import utc_now

UPLOAD_AGE = timedelta(days=1)  # an upload that is not complete by then was abandoned
MAX_REMOVALS = 100  # per pass
# A key with this prefix names an ended job instead of an object, and stands for all its checkpoints that have no row.
# Servers of earlier versions treat it as the key of an object, and find nothing to remove.
_UNRECORDED_CHECKPOINTS = PurePosixPath("unrecorded-checkpoints")


class ObjectRemovalRow(Table):
    """An object, or everything below a key. It is removed when it is due; before that, its upload may be completed."""

    __tablename__ = "object_removals"

    key: Mapped[str] = mapped_column(primary_key=True)
    is_due: Mapped[bool]
    created_at: Mapped[datetime]


def announce_upload(session: AsyncSession, key: str) -> None:
    """Record an object that is going to be stored; call `complete_upload` in the transaction that adds its row."""
    session.add(ObjectRemovalRow(key=key, is_due=False, created_at=utc_now()))


async def complete_upload(session: AsyncSession, key: str) -> None:
    """Keep an announced object. Raises `Unavailable` if it took so long that its removal has begun."""
    announced = delete(ObjectRemovalRow).where(ObjectRemovalRow.key == key, ObjectRemovalRow.is_due.is_(False))
    if (await session.execute(announced.returning(ObjectRemovalRow.key))).first() is None:
        raise Unavailable("The upload took longer than a day and was abandoned; send it again.", code="upload_expired")


async def request_removal(session: AsyncSession, key: str) -> None:
    """Record that an object is due, in the transaction that deletes its row."""
    await session.merge(ObjectRemovalRow(key=key, is_due=True, created_at=utc_now()))


def request_checkpoint_removal(session: AsyncSession, job_id: str) -> None:
    """Record that the checkpoints without a row are due, in the transaction in which their job ends."""
    key = str(_UNRECORDED_CHECKPOINTS / job_id)
    session.add(ObjectRemovalRow(key=key, is_due=True, created_at=utc_now()))


def job_of_removal(key: str) -> str | None:
    """The job whose checkpoints without a row are due; ``None`` if the key is that of an object."""
    path = PurePosixPath(key)
    return path.name if path.parent == _UNRECORDED_CHECKPOINTS else None


async def due_removals(database: Database) -> list[str]:
    """The keys to remove, the oldest first and postponed ones last. Uploads that were abandoned become due."""
    is_abandoned = ObjectRemovalRow.created_at < utc_now() - UPLOAD_AGE
    async with database.read() as session:
        num_rows = await session.scalar(select(func.count()).select_from(ObjectRemovalRow))
    if not num_rows:
        return []
    async with database.write() as session:
        await session.execute(update(ObjectRemovalRow).where(is_abandoned).values(is_due=True))
    due = select(ObjectRemovalRow.key).where(ObjectRemovalRow.is_due).order_by(ObjectRemovalRow.created_at)
    async with database.read() as session:
        return list(await session.scalars(due.limit(MAX_REMOVALS)))


async def postpone_removal(database: Database, key: str) -> None:
    """Try all other objects that are due before this one, whose removal has failed."""
    postponed = update(ObjectRemovalRow).where(ObjectRemovalRow.key == key, ObjectRemovalRow.is_due)
    async with database.write() as session:
        await session.execute(postponed.values(created_at=utc_now()))


async def removals_done(database: Database, keys: Collection[str]) -> None:
    """Forget objects that have been removed."""
    if keys:
        async with database.write() as session:
            await session.execute(
                delete(ObjectRemovalRow).where(ObjectRemovalRow.key.in_(keys), ObjectRemovalRow.is_due)
            )
