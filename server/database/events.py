"""Stores the events of a job, each with its ``seq``, and the newest warnings in the job's row.

The events are inserted at the end of the transaction, together with those of its other jobs.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.database.deferred_writes import deferred_writes
from server.database.tables import JobRow
from zeta_core.contract.job.events import EventType, WarningLine

MAX_WARNINGS = 100


def append(
    session: AsyncSession,
    job: JobRow,
    *,
    attempt: int,
    line: int | None,
    type: EventType,
    created_at: datetime,
    fields: dict[str, Any],
) -> None:
    """Store one event of ``job``, whose row the caller has locked, so that ``seq`` has no gaps or duplicates."""
    events = EventBatch(session, job)
    events.append(attempt=attempt, line=line, type=type, created_at=created_at, fields=fields)
    events.store()


class EventBatch:
    """Events of one job, whose row the caller has locked."""

    def __init__(self, session: AsyncSession, job: JobRow) -> None:
        self._session, self._job = session, job
        self._job_id, self._last_seq = job.id, job.last_seq
        self._rows: list[dict[str, Any]] = []

    def append(
        self, *, attempt: int, line: int | None, type: EventType, created_at: datetime, fields: dict[str, Any]
    ) -> None:
        """Add an event with the next ``seq``. The caller must `store` the batch before others append events."""
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

    def store(self) -> None:
        if self._rows:
            self._job.last_seq = self._last_seq
            deferred_writes(self._session).events += self._rows
            self._rows = []


def warn(job: JobRow, line: WarningLine) -> None:
    """Add a warning to ``job``, whose row the caller has locked; only the newest `MAX_WARNINGS` are kept."""
    warning = line.model_dump(mode="json", exclude={"type"}, exclude_none=True)
    job.warnings = [*job.warnings, warning][-MAX_WARNINGS:]
