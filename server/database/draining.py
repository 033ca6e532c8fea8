"""Stores which workers are drained: they get no new jobs and hand back their running ones."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import DrainRow
from zeta_core.contract.job.events import utc_now


async def drained_workers(session: AsyncSession) -> set[str]:
    """The names of all drained workers."""
    return set(await session.scalars(select(DrainRow.worker)))


async def set_drained(session: AsyncSession, worker: str, drained: bool, *, changed_by: str) -> None:
    """Drain or undrain a worker; ``changed_by`` is the id of the caller's key."""
    row = await session.get(DrainRow, worker, with_for_update=True)
    if drained and row is None:
        await session.merge(DrainRow(worker=worker, created_by=changed_by, created_at=utc_now()))
    elif not drained and row is not None:
        await session.delete(row)
