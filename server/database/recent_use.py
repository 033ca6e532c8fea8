"""The weighted mean number of slots that each project held recently, for the fair share between projects.

The server that schedules samples the held slots every `SAMPLE_SECONDS`. Formula: `server.engine.scheduling.fair_share`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Double, delete, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from server.database.inserts import dialect_insert
from server.database.tables import Table

SAMPLE_SECONDS = 15.0


class RecentUseRow(Table):
    """The mean of one project at a time; a project without a row has the mean 0."""

    __tablename__ = "recent_use"

    project: Mapped[str] = mapped_column(primary_key=True)
    mean_slots: Mapped[float] = mapped_column(Double)
    updated_at: Mapped[datetime]


@dataclass(frozen=True)
class RecentUse:
    mean_slots: float
    updated_at: datetime


async def recent_use(session: AsyncSession) -> Mapping[str, RecentUse]:
    """The stored means by project."""
    rows = await session.execute(select(RecentUseRow.project, RecentUseRow.mean_slots, RecentUseRow.updated_at))
    return {project: RecentUse(mean_slots, updated_at) for project, mean_slots, updated_at in rows}


async def store_recent_use(session: AsyncSession, means: Mapping[str, float], at: datetime) -> None:
    """Replace the means of all projects; those that are missing become 0."""
    await session.execute(delete(RecentUseRow).where(RecentUseRow.project.not_in(means)))
    if means:
        rows = [{"project": name, "mean_slots": mean, "updated_at": at} for name, mean in means.items()]
        insert = dialect_insert(session, RecentUseRow)
        changed = {name: insert.excluded[name] for name in ("mean_slots", "updated_at")}
        await session.execute(insert.on_conflict_do_update(index_elements=["project"], set_=changed), rows)
