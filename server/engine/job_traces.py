"""Exports the trace of a job's start when its first attempt has made its first step, or has ended before it.

The server makes all spans, from the events that it stores. So workers and runs need no exporter and no access to a
collector, and the spans of a job are complete although several machines took part. Traces are best effort: those of a
server that is killed at this moment are lost, and repeated messages add nothing.
"""

from __future__ import annotations

import logging
from datetime import datetime

from sqlalchemy import select

from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.database.tables import AttemptRow, EventRow, JobRow
from server.tracing.job import JobStart, job_spans
from server.tracing.tracing import Tracing

TRACED_ATTEMPT = 1

logger = logging.getLogger(__name__)


class JobTraces:
    def __init__(self, database: Database, tracing: Tracing | None) -> None:
        """Without an exporter (``tracing``), nothing is read and nothing is recorded."""
        self._database, self._tracing = database, tracing

    async def record(self, job_id: str, attempt: int) -> None:
        """Export the spans of the job's start, if its submission was traced."""
        if self._tracing is None or attempt != TRACED_ATTEMPT:
            return
        try:
            async with self._database.read() as session:
                job = await session.get(JobRow, job_id)
                row = await session.get(AttemptRow, (job_id, attempt))
                query = select(EventRow).where(EventRow.job_id == job_id, EventRow.attempt <= attempt)
                events = list(
                    await session.scalars(query.where(EventRow.type.in_(("status", "progress"))).order_by(EventRow.seq))
                )
        except DatabaseUnavailable as error:
            logger.warning("The trace of %s was not exported: %s", job_id, error.message)
            return
        trace_parent = events[0].fields.get("trace_parent") if events else None
        if job is None or row is None or not isinstance(trace_parent, str):
            return
        attributes = {"zeta.job_id": job_id, "zeta.project": job.project, "zeta.worker": row.worker}
        self._tracing.record_job(trace_parent, job_spans(_start(job, row, events)), attributes)


def _start(job: JobRow, attempt: AttemptRow, events: list[EventRow]) -> JobStart:
    """The times of the first attempt."""
    phases: dict[str, datetime] = {}
    first_step: datetime | None = None
    for event in events:
        if event.type == "progress" and first_step is None:
            phases.setdefault(str(event.fields.get("phase")), event.created_at)
            if event.fields.get("step"):
                first_step = event.created_at
    ended_at = first_step or attempt.finished_at or events[-1].created_at
    return JobStart(
        created_at=job.created_at,
        dispatched_at=job.dispatched_at or attempt.started_at,  # it is unset when the attempt has ended
        started_at=attempt.started_at,
        phases=phases,
        ended_at=ended_at,
        failure=None if first_step is not None else attempt.reason,
    )
