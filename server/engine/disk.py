"""Jobs that are paused until the disk has room go on by themselves when a worker that takes jobs has some."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select

from server.database.db import Database
from server.database.state import change_status, lock_job
from server.database.tables import JobRow
from server.engine.loops import raise_first, try_each
from zeta_core.contract.events import utc_now
from zeta_core.contract.job import JobStatus, StatusReason

# Without it, a job whose checkpoint does not fit although its worker is above its mark would start all the time.
REST_SECONDS = 10.0
MESSAGE = "There is room on the disk again."


async def queue_what_waits_for_room(database: Database) -> list[str]:
    """Queue every job that waits for room and has rested; returns their ids. Call it only where there is room."""
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
        if now - timedelta(seconds=REST_SECONDS) < since <= now:  # a time that is still to come is of another clock
            return
        async with database.write() as session:
            job = await lock_job(session, job_id)
            if job is None or job.status_reason != StatusReason.DISK_FULL:
                return
            changed = await change_status(
                session,
                job,
                JobStatus.QUEUED,
                expect={JobStatus.PAUSED},
                attempt=job.attempt,
                reason=StatusReason.RESUMED,
                message=MESSAGE,
            )
            if changed is not None:
                queued.append(job_id)

    raise_first(await try_each(rows, consider))
    return queued
