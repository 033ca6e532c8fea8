"""Queries of stored checkpoints: the newest one of a job, and those that other jobs need."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import CheckpointRow, JobRow
from zeta_core.contract.job.status import ENDED

LATEST = "latest"


def checkpoints_newest_first(job_id: str) -> Select[str]:
    """The names by step, the highest first; of several of one step a ``step-N``, which keeps its training state."""
    order = (CheckpointRow.step.desc(), func.length(CheckpointRow.name).desc(), CheckpointRow.name)
    return select(CheckpointRow.name).where(CheckpointRow.job_id == job_id).order_by(*order)


async def newest_to_resume(session: AsyncSession, job_id: str) -> str | None:
    """The checkpoint from which the training goes on; ``best`` is for its users, and gives way to a better one."""
    return await session.scalar(checkpoints_newest_first(job_id).where(CheckpointRow.name != "best").limit(1))


async def resume_from(session: AsyncSession, job: JobRow) -> str | None:
    """``job_.../name``: the job's own newest stored checkpoint; before it has one, that which its spec names."""
    own = await newest_to_resume(session, job.id)
    if own is not None:
        return f"{job.id}/{own}"
    named = job.spec.get("resume_from_checkpoint")
    if not isinstance(named, str):
        return None
    other, _, name = named.partition("/")
    return f"{other}/{name or await newest_to_resume(session, other) or 'final'}"


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
