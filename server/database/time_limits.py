"""How long a job has run, over all its attempts, against its ``time_limit_seconds``.

An attempt runs from its granted claim to its end. The engine notes it in `AttemptRow.ran_seconds` by its monotonic
clock, so that a clock that jumps neither ends a job early nor lets it run on; what is not noted is taken from the
times of the attempt's start and end.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import AttemptRow, JobRow
from zeta_core.contract.job.events import utc_now


def limit_of(spec: dict[str, Any]) -> float | None:
    """The ``time_limit_seconds`` of a job's spec."""
    limit = spec.get("time_limit_seconds")
    return float(limit) if isinstance(limit, int | float) else None


async def earlier_seconds(session: AsyncSession, job_id: str, attempt: int) -> float:
    """How long the attempts before ``attempt`` ran."""
    earlier = select(AttemptRow).where(AttemptRow.job_id == job_id, AttemptRow.attempt < attempt)
    return sum([ran_seconds(row) for row in await session.scalars(earlier)])


def ran_seconds(row: AttemptRow) -> float:
    """How long one attempt ran, or has run until now."""
    if row.ran_seconds is not None:
        return row.ran_seconds
    return max(0.0, ((row.finished_at or utc_now()) - row.started_at).total_seconds())


async def is_used_up(session: AsyncSession, job: JobRow) -> bool:
    """Whether the job, which has no running attempt or one that is just ending, has no time left to run."""
    limit = limit_of(job.spec)
    return limit is not None and await earlier_seconds(session, job.id, job.attempt + 1) >= limit
