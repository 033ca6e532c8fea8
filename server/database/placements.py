"""The placements of an attempt on several nodes: one row for each worker, from its dispatch until it is released.

An attempt on one worker has none; its worker and slots are in `JobRow`. All rows of an attempt are written in the
transaction that starts it, so an attempt is never dispatched to a part of its workers. A row that is not released
occupies its slots, and the next attempt of the job waits for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint, literal_column, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from server.database.tables import Table


class PlacementState(StrEnum):
    DISPATCHED = "dispatched"  # no worker process has claimed it
    CLAIMED = "claimed"  # the worker fetches its inputs
    PREPARED = "prepared"  # it waits for the others
    RUNNING = "running"
    RELEASED = "released"  # no process of the attempt is left on the worker, or its lease has expired


class PlacementRow(Table):
    """One node of an attempt. ``last_line`` is the last line of its journal, a `StatusLine`."""

    __tablename__ = "placements"
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "worker"),
        Index(
            "ix_placements_unreleased",
            "worker",
            sqlite_where=text("state <> 'released'"),
            postgresql_where=text("state <> 'released'"),
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    node_rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    worker: Mapped[str]
    slots: Mapped[list[Any]]
    state: Mapped[str]
    incarnation: Mapped[str | None]  # of the worker process that claimed it
    address: Mapped[str | None]  # where the other nodes reach it
    port: Mapped[int | None]
    stored_line: Mapped[int] = mapped_column(default=0)  # of its journal; for node 0, only that of ``last_line``
    last_line: Mapped[dict[str, Any] | None]
    ended_at: Mapped[datetime | None]  # when ``last_line`` was stored

    @property
    def is_released(self) -> bool:
        return self.state == PlacementState.RELEASED


# A parameter would not match the partial index.
UNRELEASED = PlacementRow.state != literal_column(f"'{PlacementState.RELEASED}'")


async def placements_of(session: AsyncSession, job_id: str, attempt: int) -> Sequence[PlacementRow]:
    """The placements of an attempt by node rank; empty if it runs on one worker."""
    query = select(PlacementRow).where(PlacementRow.job_id == job_id, PlacementRow.attempt == attempt)
    return (await session.scalars(query.order_by(PlacementRow.node_rank))).all()


async def placements_of_jobs(
    session: AsyncSession, job_ids: Collection[str]
) -> Mapping[tuple[str, int], Sequence[PlacementRow]]:
    """The placements of all attempts of these jobs, by job and attempt, each in the order of the node ranks."""
    found: defaultdict[tuple[str, int], list[PlacementRow]] = defaultdict(list)
    query = select(PlacementRow).where(PlacementRow.job_id.in_(job_ids)).order_by(PlacementRow.node_rank)
    for row in await session.scalars(query):
        found[row.job_id, row.attempt].append(row)
    return found


async def unreleased_placements(session: AsyncSession, job_id: str | None = None) -> Sequence[PlacementRow]:
    """All placements that are not released, or those of one job, by attempt and node rank."""
    query = select(PlacementRow).where(UNRELEASED)
    if job_id is not None:
        query = query.where(PlacementRow.job_id == job_id)
    order = (PlacementRow.job_id, PlacementRow.attempt, PlacementRow.node_rank)
    return (await session.scalars(query.order_by(*order))).all()
