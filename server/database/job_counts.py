"""The numbers of jobs by project, status and priority, which triggers maintain (migrations 0007 and 0008).

Every change of a job's status adds a row with +1 and one with -1, in the same transaction. The numbers are the sums.
Adding rows instead of updating a total means that concurrent transactions never wait for each other. `merge_counts`
replaces the rows by their sums periodically, so that there are few to add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database
from server.database.tables import JobCountRow
from zeta_core.contract.job.status import JobStatus

MERGE_SECONDS = 1.0  # the interval of `merge_counts`
MAX_ROWS = 200  # fewer rows are not merged


async def jobs_by_project(session: AsyncSession) -> Mapping[tuple[str, str], int]:
    """The number of jobs for each project and status."""
    columns = (JobCountRow.project, JobCountRow.status)
    totals = select(*columns, func.sum(JobCountRow.count)).group_by(*columns)
    return {(project, status): int(count) for project, status, count in await session.execute(totals)}


async def queued_by_priority(session: AsyncSession, project: str) -> Mapping[int, int]:
    """The number of the project's queued jobs for each priority."""
    totals = select(JobCountRow.priority, func.sum(JobCountRow.count)).group_by(JobCountRow.priority)
    queued = totals.where(JobCountRow.project == project, JobCountRow.status == JobStatus.QUEUED)
    return {priority: int(count) for priority, count in await session.execute(queued)}


async def merge_counts(database: Database, *, max_rows: int = MAX_ROWS) -> None:
    """Replace the rows by their sums if there are more than ``max_rows``. Several servers may do so concurrently."""
    async with database.read() as session:
        if (await session.scalar(select(func.count()).select_from(JobCountRow)) or 0) <= max_rows:
            return
    async with database.write() as session:
        # Only the rows that this statement returns are deleted, whatever other transactions add or delete concurrently.
        columns = (JobCountRow.project, JobCountRow.status, JobCountRow.priority, JobCountRow.count)
        sums: Counter[tuple[str, str, int]] = Counter()
        for project, status, priority, count in await session.execute(delete(JobCountRow).returning(*columns)):
            sums[project, status, priority] += count
        rows = [
            {"project": project, "status": status, "priority": priority, "count": count}
            for (project, status, priority), count in sums.items()
            if count
        ]
        if rows:
            await session.execute(insert(JobCountRow), rows)
