"""Stores the events of a job, each with its ``seq``, and the newest warnings in the job's row."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import EventRow, JobRow
from zeta_core.contract.job.events import EventType, WarningLine

MAX_WARNINGS = 100
_INSERT = insert(EventRow.metadata.tables[EventRow.__tablename__])  # faster than with the class


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
    """Store one event of ``job``, whose row the caller has locked, so that ``seq`` has no gaps or duplicates."""
    job.last_seq += 1
    row = EventRow(
        job_id=job.id, seq=job.last_seq, attempt=attempt, line=line, type=type, created_at=created_at, fields=fields
    )
    session.add(row)
    return row


class EventBatch:
    """Events of one job, whose row the caller has locked; `store` inserts them with one statement."""

    def __init__(self, job: JobRow) -> None:
        self._job = job
        self._job_id, self._last_seq = job.id, job.last_seq
        self._rows: list[dict[str, Any]] = []

    def append(
        self, *, attempt: int, line: int | None, type: EventType, created_at: datetime, fields: dict[str, Any]
    ) -> None:
        """Add an event with the next ``seq``. The caller must `store` the batch before `append` gets other events."""
        self._last_seq += 1
        self._rows.append(
            {
                "job_id": self._job_id,
                "seq": self._last_seq,
                "attempt": attempt,
                "line": line,
                "type": type,
                "created_at": created_at,
                "fields": fields,
            }
        )

    async def store(self, session: AsyncSession) -> None:
        if self._rows:
            self._job.last_seq = self._last_seq
            await session.execute(_INSERT, self._rows)
            self._rows = []


def warn(job: JobRow, line: WarningLine) -> None:
    """Add a warning to ``job``, whose row the caller has locked; only the newest `MAX_WARNINGS` are kept."""
    warning = line.model_dump(mode="json", exclude={"type"}, exclude_none=True)
    job.warnings = [*job.warnings, warning][-MAX_WARNINGS:]
