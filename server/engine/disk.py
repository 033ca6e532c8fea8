"""Resumes jobs that were paused by a full disk, once a worker that accepts jobs has free space."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select

from server.database.db import Database
from server.database.tables import JobRow
from server.database.transitions import StatusChange, change_status, lock_job
from server.engine.loops import raise_first, try_each
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus, StatusReason

# Otherwise, a job whose checkpoint doesn't fit on a disk above its low-space threshold would restart continuously.
REST_SECONDS = 10.0
MESSAGE = "Disk space is available again."


async def resume_paused_by_disk(database: Database) -> list[str]:
    """Queue the jobs that a full disk paused at least `REST_SECONDS` ago; returns their ids.

    Call it only when a worker has free space.
    """
    waiting = select(JobRow.id, JobRow.waiting_reason).where(
        JobRow.status == JobStatus.PAUSED, JobRow.status_reason == StatusReason.DISK_FULL
    )
    async with database.read() as session:
        rows = (await session.execute(waiting)).all()
    now = utc_now()
    queued: list[str] = []

    async def consider(row: Any) -> None:
        job_id, reason = row
        since = datetime.fromisoformat((reason or {})["since"])
        if now - timedelta(seconds=REST_SECONDS) < since <= now:  # a future time comes from another clock
            return
        async with database.write() as session:
            job = await lock_job(session, job_id)
            if job is None or job.status_reason != StatusReason.DISK_FULL:
                return
            change = StatusChange(JobStatus.QUEUED, StatusReason.RESUMED, message=MESSAGE)
            if await change_status(session, job, change, expect={JobStatus.PAUSED}, attempt=job.attempt):
                queued.append(job_id)

    raise_first(await try_each(rows, consider))
    return queued
