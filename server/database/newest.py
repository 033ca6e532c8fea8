"""Which of a job's stored checkpoints is the newest: what the name ``latest`` means, and where a training goes on."""

from __future__ import annotations

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import CheckpointRow

LATEST = "latest"


def checkpoints_newest_first(job_id: str) -> Select[str]:
    """The names by step, the highest first; of several of one step a ``step-N``, which keeps its training state."""
    order = (CheckpointRow.step.desc(), func.length(CheckpointRow.name).desc(), CheckpointRow.name)
    return select(CheckpointRow.name).where(CheckpointRow.job_id == job_id).order_by(*order)


async def newest_to_resume(session: AsyncSession, job_id: str) -> str | None:
    """The checkpoint from which the training goes on; ``best`` is for its users, and gives way to a better one."""
    return await session.scalar(checkpoints_newest_first(job_id).where(CheckpointRow.name != "best").limit(1))
