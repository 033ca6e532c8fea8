"""Lists and reads jobs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text, cast, func
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.pages import newest_first, page
from server.database.tables import JobRow
from server.database.transitions import lock_job
from server.jobs.objects import describe, describe_one
from server.jobs.query import JobQuery, matching
from server.service import Service
from zeta_core.contract.errors import NotFound
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.answers import Page
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import Job, WaitingReason
from zeta_core.contract.job.status import WAITING_SENTENCES, WaitingCode
from zeta_core.contract.spec.validation import shown

# A job contains its spec twice: as submitted, and resolved.
_SPEC_BYTES = 2 * func.length(cast(JobRow.spec, Text))


async def list_jobs(service: Service, caller: Caller, asked: JobQuery) -> Page[Job]:
    async with service.database.read() as session:
        query = matching(caller.project, asked)
        rows, has_more = await newest_first(session, JobRow, query, asked, size=_SPEC_BYTES)
        return page(await describe(session, rows), has_more, lambda job: job.id)


async def get_job(service: Service, caller: Caller, job_id: str) -> Job:
    async with service.database.read() as session:
        return await describe_one(session, await find_job(session, caller, job_id))


async def require_job(service: Service, caller: Caller, job_id: str) -> None:
    """Raise `NotFound` unless the caller has this job."""
    async with service.database.read() as session:
        await find_job(session, caller, job_id)


async def find_job(session: AsyncSession, caller: Caller, job_id: str, *, lock: bool = False) -> JobRow:
    """The caller's job, locked for the transaction if ``lock``. Raises `NotFound`, also for jobs of other projects."""
    row: JobRow | None = None
    if is_id(job_id, "job"):
        row = await (lock_job(session, job_id) if lock else session.get(JobRow, job_id))
    if row is None or row.project != caller.project or row.deleted_at is not None:
        raise NotFound(f"Job {shown(job_id)} not found; GET /v1/jobs lists your jobs.", code="job_not_found")
    return row


def first_waiting_reason(service: Service) -> dict[str, Any] | None:
    """The waiting reason of a new job until the scheduler has processed it."""
    if any(service.engine.is_alive(beat.worker) for beat in service.engine.workers()):
        return None
    code = WaitingCode.NO_WORKER
    return WaitingReason(code=code, message=WAITING_SENTENCES[code], since=utc_now()).model_dump(mode="json")
