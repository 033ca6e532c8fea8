"""Which of a job's checkpoints other jobs will still start from: they stay, whatever its ``save_total_limit`` says."""

from __future__ import annotations

from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import JobRow
from zeta_core.contract.job import ENDED


async def needed_checkpoints(session: AsyncSession, job: JobRow) -> set[str]:
    """The checkpoints of ``job`` that a job which has not ended resumes by name, or takes its weights from."""
    resumes = JobRow.spec["resume_from_checkpoint"].as_string().startswith(f"{job.id}/", autoescape=True)
    begins = JobRow.resolved_spec["model"]["job"].as_string() == job.id
    waiting = select(JobRow.spec, JobRow.resolved_spec).where(
        JobRow.status.not_in(ENDED), JobRow.project == job.project, or_(resumes, begins)
    )
    needed: set[str] = set()
    for spec, resolved in await session.execute(waiting):
        other, _, name = str(spec.get("resume_from_checkpoint")).partition("/")
        model: Any = resolved.get("model")
        needed |= {name} if other == job.id else set[str]()
        needed |= (
            {str(model.get("checkpoint"))} if isinstance(model, dict) and model.get("job") == job.id else set[str]()
        )
    return needed
