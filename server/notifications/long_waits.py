"""Announces jobs that have been queued for a long time, once for each time that they are queued."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import or_, select

from server.database.announcements import announce
from server.database.connections import Database
from server.database.tables import JobRow
from server.database.transitions import lock_job
from server.database.webhook_tables import WebhookRow
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus

PACE_SECONDS = 5.0
MAX_JOBS = 100  # of one pass

_WEBHOOKS = select(WebhookRow.project, WebhookRow.events).where(WebhookRow.enabled)


async def announce_long_waits(database: Database, after_seconds: float) -> None:
    """Store the messages about jobs that have been queued for more than ``after_seconds``."""
    queued_before = utc_now() - timedelta(seconds=after_seconds)
    async with database.read() as session:
        webhooks = (await session.execute(_WEBHOOKS)).all()
        projects = {project for project, events in webhooks if "job.waiting" in events}
        has_receiver = or_(JobRow.project.in_(projects), JobRow.spec["notify"].as_string().is_not(None))
        waiting = select(JobRow.id).where(
            JobRow.status == JobStatus.QUEUED,
            JobRow.queued_at <= queued_before,
            JobRow.wait_announced_at.is_(None),
            has_receiver,
        )
        ids = list(await session.scalars(waiting.limit(MAX_JOBS)))
    for job_id in ids:
        async with database.write() as session:
            job = await lock_job(session, job_id)
            if job is None or job.status != JobStatus.QUEUED or job.wait_announced_at is not None:
                continue
            reason: dict[str, Any] = job.waiting_reason or {}
            job.wait_announced_at = now = utc_now()
            await announce(session, job, "job.waiting", at=now, message=reason.get("message"))
