"""Which of a job's stored checkpoints is the newest: what the name ``latest`` means."""

from __future__ import annotations

from sqlalchemy import Select, func, select

from server.database.tables import CheckpointRow


def checkpoints_newest_first(job_id: str) -> Select[str]:
    """The names by step, the highest first; of several of one step a ``step-N``, which keeps its training state."""
    order = (CheckpointRow.step.desc(), func.length(CheckpointRow.name).desc(), CheckpointRow.name)
    return select(CheckpointRow.name).where(CheckpointRow.job_id == job_id).order_by(*order)
