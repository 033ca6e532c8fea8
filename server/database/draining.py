"""Which workers are drained."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import DrainRow


async def drained_workers(session: AsyncSession) -> set[str]:
    """The names of the workers that get no job and hand back those they have."""
    return set(await session.scalars(select(DrainRow.worker)))
