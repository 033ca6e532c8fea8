"""Measures how long a job has run, over all its attempts, against its ``time_limit_seconds``.

An attempt runs from its granted claim to its end, and one on several workers from their common start; its preparation
counts as 0 seconds. The engine records the time in `AttemptRow.ran_seconds`, measured by its monotonic clock, so that a
changed system clock neither ends a job early nor extends it. Without a recorded time, the attempt's start and end times
are used.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import AttemptRow, JobRow
from zeta_core.contract.job.events import utc_now


def time_limit_of(spec: dict[str, Any]) -> float | None:
    """The ``time_limit_seconds`` of a job's spec, if it has one."""
    limit = spec.get("time_limit_seconds")
    return float(limit) if isinstance(limit, int | float) else None


async def seconds_before_attempt(session: AsyncSession, job_id: str, attempt: int) -> float:
    """The total running time of the attempts before ``attempt``."""
    earlier = select(AttemptRow).where(AttemptRow.job_id == job_id, AttemptRow.attempt < attempt)
    return sum([ran_seconds(row) for row in await session.scalars(earlier)])


def ran_seconds(row: AttemptRow) -> float:
    """The running time of one attempt, until its end or until now."""
    if row.ran_seconds is not None:
        return row.ran_seconds
    return max(0.0, ((row.finished_at or utc_now()) - row.started_at).total_seconds())


async def has_reached_time_limit(session: AsyncSession, job: JobRow) -> bool:
    """Whether the job has reached its time limit. Its last attempt must have ended, or be about to end."""
    limit = time_limit_of(job.spec)
    return limit is not None and await seconds_before_attempt(session, job.id, job.attempt + 1) >= limit
