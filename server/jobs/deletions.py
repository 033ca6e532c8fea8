"""Deletes ended jobs with all their data, unless another job needs them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete as delete_rows
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.tables import IdempotencyRow, JobRow
from server.engine.job_removal import remove_deleted
from server.jobs.commands import require_accepted
from server.jobs.queries import find_job
from server.service import Service
from zeta_core.contract.errors import Conflict
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.responses import DeletedObject
from zeta_core.contract.job.status import UNFINISHED


async def delete(service: Service, caller: Caller, job_id: str) -> DeletedObject:
    """Delete an ended job. Raises `NotFound`, and `Conflict` if it hasn't ended or another job needs it."""
    async with service.database.write() as session:
        row = await find_job(session, caller, job_id, lock=True)
        require_accepted(row, "delete")
        await _require_unneeded(session, row)
        row.deleted_at = utc_now()
        session.add(caller.audit_row("job.delete", row.id, project=row.project))
        await session.execute(delete_rows(IdempotencyRow).where(IdempotencyRow.job_id == job_id))
    await remove_deleted(service.database, service.artifacts, job_id)
    return DeletedObject(id=job_id, object="job")


async def _require_unneeded(session: AsyncSession, row: JobRow) -> None:
    """Raise `Conflict` if an unfinished job is a rerun of this one, resumes it, or starts from its weights."""
    resumes = JobRow.spec["resume_from_checkpoint"].as_string()
    unfinished = select(JobRow).where(
        JobRow.project == row.project,
        JobRow.status.in_(UNFINISHED),
        JobRow.id != row.id,
        or_(
            resumes == row.id,
            resumes.startswith(f"{row.id}/", autoescape=True),
            JobRow.spec["model"]["job"].as_string() == row.id,
            JobRow.parent == row.id,
        ),
    )
    other = await session.scalar(unfinished.limit(1))
    need = _need(other, row.id) if other is not None else None
    if other is not None and need is not None:
        raise Conflict(
            f"Job {row.id} is needed by {other.id}, which is {other.status} and {need}; "
            "cancel that job first, or wait until it ends.",
            code="job_in_use",
        )


def _need(other: JobRow, job_id: str) -> str | None:
    """The reason why ``other`` needs the job, as a verb phrase."""
    resumed: Any = other.spec.get("resume_from_checkpoint")
    if isinstance(resumed, str) and resumed.partition("/")[0] == job_id:
        return "resumes it"
    model: Any = other.spec.get("model")
    if isinstance(model, dict) and model.get("job") == job_id:
        return "starts from its weights"
    return "is a rerun of it" if other.parent == job_id else None
