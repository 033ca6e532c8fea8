"""The one door for a job's events: gives each its ``seq`` in the transaction that stores it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import EventRow, JobRow
from zeta_core.contract.events import EventType


async def append(
    session: AsyncSession,
    job: JobRow,
    *,
    attempt: int,
    line: int | None,
    type: EventType,
    created_at: datetime,
    fields: dict[str, Any],
) -> EventRow:
    """Store one event of ``job``, whose row the caller holds locked, so that ``seq`` has no gap and no double."""
    job.last_seq += 1
    row = EventRow(
        job_id=job.id, seq=job.last_seq, attempt=attempt, line=line, type=type, created_at=created_at, fields=fields
    )
    session.add(row)
    return row
