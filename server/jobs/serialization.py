"""Converts rows to the `Job` objects of the API."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import AttemptRow, CheckpointRow, JobRow
from zeta_core.contract.job.job import Attempt, Job
from zeta_core.contract.job.status import JobStatus

FINAL_CHECKPOINT = "final"


async def to_job(session: AsyncSession, row: JobRow) -> Job:
    return (await to_jobs(session, [row]))[0]


async def to_jobs(session: AsyncSession, rows: Sequence[JobRow]) -> list[Job]:
    """The jobs of ``rows``, in their order, with attempts, checkpoints and queue positions."""
    started = [row.id for row in rows if row.attempt > 0]
    attempts: dict[str, list[Attempt]] = defaultdict(list)
    checkpoints: dict[str, set[str]] = defaultdict(set)
    if started:
        attempt_rows = select(AttemptRow).where(AttemptRow.job_id.in_(started)).order_by(AttemptRow.attempt)
        for attempt in await session.scalars(attempt_rows):
            attempts[attempt.job_id].append(Attempt.model_validate(attempt, from_attributes=True))
        names = select(CheckpointRow.job_id, CheckpointRow.name).where(CheckpointRow.job_id.in_(started))
        for job_id, name in (await session.execute(names)).tuples():
            checkpoints[job_id].add(name)
    queued = [row for row in rows if row.status == JobStatus.QUEUED]
    positions = (
        {queued[0].id: await _position(session, queued[0])} if len(queued) == 1 else await _positions(session, queued)
    )
    return [_job(row, attempts[row.id], checkpoints[row.id], positions.get(row.id)) for row in rows]


async def _position(session: AsyncSession, row: JobRow) -> int:
    """The position of one job in the queue, starting at 1."""
    older = or_(JobRow.created_at < row.created_at, and_(JobRow.created_at == row.created_at, JobRow.id <= row.id))
    same = and_(JobRow.priority == row.priority, older)
    ahead = select(func.count()).where(JobRow.status == JobStatus.QUEUED, or_(JobRow.priority > row.priority, same))
    return await session.scalar(ahead) or 1


async def _positions(session: AsyncSession, rows: Sequence[JobRow]) -> dict[str, int]:
    """The positions of several jobs, in one query over the queue."""
    if not rows:
        return {}
    order = (JobRow.priority.desc(), JobRow.created_at, JobRow.id)
    position = func.row_number().over(order_by=order).label("position")
    queue = select(JobRow.id, position).where(JobRow.status == JobStatus.QUEUED).subquery()
    selected = queue.c.id.in_([row.id for row in rows])
    return dict((await session.execute(select(queue.c.id, queue.c.position).where(selected))).tuples().all())


def _job(row: JobRow, attempts: list[Attempt], checkpoints: set[str], position: int | None) -> Job:
    return Job.model_validate(
        {
            "id": row.id,
            "project": row.project,
            "created_by": row.created_by,
            "parent": row.parent,
            "status": row.status,
            "status_reason": row.status_reason,
            "requested_action": row.requested_action,
            "waiting_reason": row.waiting_reason,
            "queue_position": position,
            "entity_name": row.entity_name,
            "spec": row.spec,
            "resolved_spec": row.resolved_spec_json,
            "attempt": row.attempt,
            "attempts": attempts,
            "max_retries": row.max_retries,
            "created_at": row.created_at,
            "started_at": row.started_at,
            "finished_at": row.finished_at,
            "progress": row.progress,
            "worker": row.worker,
            "result": row.result,
            "error": row.error,
            "warnings": row.warnings,
            "checkpoints": len(checkpoints),
            "final_checkpoint": FINAL_CHECKPOINT if FINAL_CHECKPOINT in checkpoints else None,
            "metadata": row.job_metadata,
        }
    )
