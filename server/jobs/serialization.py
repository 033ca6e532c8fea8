"""Converts rows to the `Job` objects of the API."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from sqlalchemy import Text, cast, func, literal_column, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.job_counts import queued_by_priority
from server.database.placements import placements_of_jobs
from server.database.tables import AttemptRow, CheckpointRow, JobRow
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.job.job import Attempt, Job, Node
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.secret_texts import masked_values

_IS_QUEUED = JobRow.status == literal_column(f"'{JobStatus.QUEUED}'")  # a parameter would not match the partial index
SPEC_BYTES = 2 * func.length(cast(JobRow.spec, Text))  # a job contains its spec twice: as submitted, and resolved
NEAR_END, NEAR_FRONT = 200, 200  # jobs whose queue positions are found without counting the queue


async def to_job(session: AsyncSession, row: JobRow) -> Job:
    return (await to_jobs(session, [row]))[0]


async def to_jobs(session: AsyncSession, rows: Sequence[JobRow]) -> list[Job]:
    """The jobs of ``rows``, in their order, with attempts, checkpoints and queue positions."""
    started = [row.id for row in rows if row.attempt > 0]
    attempts: dict[str, list[Attempt]] = defaultdict(list)
    checkpoints: dict[str, set[str]] = defaultdict(set)
    if started:
        attempt_rows = select(AttemptRow).where(AttemptRow.job_id.in_(started)).order_by(AttemptRow.attempt)
        loaded_attempts = (await session.scalars(attempt_rows)).all()
        on_several_workers = {attempt.job_id for attempt in loaded_attempts if attempt.num_nodes > 1}
        placements = await placements_of_jobs(session, on_several_workers) if on_several_workers else {}
        for attempt in loaded_attempts:
            several = placements.get((attempt.job_id, attempt.attempt), [])
            nodes = [Node.model_validate(node, from_attributes=True) for node in several]
            loaded = Attempt.model_validate(attempt, from_attributes=True)
            attempts[attempt.job_id].append(loaded.model_copy(update={"nodes": nodes}) if nodes else loaded)
        names = select(CheckpointRow.job_id, CheckpointRow.name).where(CheckpointRow.job_id.in_(started))
        for job_id, name in (await session.execute(names)).tuples():
            checkpoints[job_id].add(name)
    positions = await _positions(session, [row for row in rows if row.status == JobStatus.QUEUED])
    return [_job(row, attempts[row.id], checkpoints[row.id], positions.get(row.id)) for row in rows]


async def _positions(session: AsyncSession, rows: Sequence[JobRow]) -> dict[str, int]:
    """The positions of queued jobs among those of their project, starting at 1."""
    positions: dict[str, int] = {}
    for project in sorted({row.project for row in rows}):
        of_project = [row for row in rows if row.project == project]
        positions |= await _positions_in_project(session, project, of_project)
    return positions


async def _positions_in_project(session: AsyncSession, project: str, rows: Sequence[JobRow]) -> dict[str, int]:
    totals = await queued_by_priority(session, project)
    positions: dict[str, int] = {}
    for priority in {row.priority for row in rows}:
        ids = {row.id for row in rows if row.priority == priority}
        ahead = sum(count for other, count in totals.items() if other > priority)
        # New jobs are near the end of the queue, and jobs that start soon are near its front: usually, neither the
        # rest of the queue nor its length matters.
        last = await _numbers(session, project, priority, ids, newest_first=True, limit=NEAR_END)
        positions |= {job_id: ahead + totals[priority] - number + 1 for job_id, number in last.items()}
        if left := ids - positions.keys():
            first = await _numbers(session, project, priority, left, newest_first=False, limit=NEAR_FRONT)
            positions |= {job_id: ahead + number for job_id, number in first.items()}
        if between := [row for row in rows if row.id in ids - positions.keys()]:
            found = await _numbers_between(session, project, priority, between)
            positions |= {job_id: ahead + number for job_id, number in found.items()}
    return positions


async def _numbers(
    session: AsyncSession, project: str, priority: int, ids: Collection[str], *, newest_first: bool, limit: int
) -> dict[str, int]:
    """The numbers, from 1, of these jobs among the project's oldest or newest ``limit`` queued jobs of a priority."""
    columns = (JobRow.created_at, JobRow.id)
    order = [column.desc() if newest_first else column.asc() for column in columns]
    queue = select(*columns).where(_IS_QUEUED, JobRow.project == project, JobRow.priority == priority)
    part = queue.order_by(*order).limit(limit).subquery()
    numbered_order = [part.c.created_at.desc(), part.c.id.desc()] if newest_first else [part.c.created_at, part.c.id]
    numbered = select(part.c.id, func.row_number().over(order_by=numbered_order).label("number")).subquery()
    selected = select(numbered.c.id, numbered.c.number).where(numbered.c.id.in_(ids))
    return dict((await session.execute(selected)).all())


async def _numbers_between(
    session: AsyncSession, project: str, priority: int, rows: Sequence[JobRow]
) -> dict[str, int]:
    """The numbers, from 1, of these jobs among all queued jobs of a priority.

    Only the jobs between the first and the last of ``rows`` are numbered. Those before them are counted, which reads
    nothing but an index, so a page near the middle of a long queue takes hardly longer than others.
    """
    queued = (_IS_QUEUED, JobRow.project == project, JobRow.priority == priority)
    position = tuple_(JobRow.created_at, JobRow.id)
    ends = sorted((row.created_at, row.id) for row in rows)
    before = await session.scalar(select(func.count()).where(*queued, position < ends[0])) or 0
    number = func.row_number().over(order_by=(JobRow.created_at, JobRow.id)).label("number")
    part = select(JobRow.id, number).where(*queued, position >= ends[0], position <= ends[-1]).subquery()
    selected = select(part.c.id, part.c.number).where(part.c.id.in_([row.id for row in rows]))
    return {job_id: before + found for job_id, found in (await session.execute(selected)).all()}


def _job(row: JobRow, attempts: list[Attempt], checkpoints: set[str], position: int | None) -> Job:
    return Job.model_validate(
        {
            "id": row.id,
            "kind": row.kind,
            "project": row.project,
            "created_by": row.created_by,
            "parent": row.parent,
            "sweep": row.sweep,
            "status": row.status,
            "status_reason": row.status_reason,
            "requested_action": row.requested_action,
            "checkpoint_requested": row.num_save_requests > row.fulfilled_save_request,
            "waiting_reason": row.waiting_reason,
            "queue_position": position,
            "entity_name": row.entity_name,
            # New specs contain no secrets; those that were stored before this was checked may.
            "spec": masked_values(row.spec),
            "resolved_spec": masked_values(row.resolved_spec_json),
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
            "metadata": masked_values(row.job_metadata),
        }
    )
