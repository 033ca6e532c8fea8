"""Which of a job's stored checkpoints is the newest: what the name ``latest`` means, and where a training goes on."""

from __future__ import annotations

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import CheckpointRow, JobRow

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
