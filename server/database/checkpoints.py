"""The stored checkpoints of jobs: queries, recording, and retention.

Retention: a job keeps its newest ``save_total_limit`` checkpoints ``step-N``, ``best``, ``final``, and those that
unfinished jobs depend on. The worker applies the same rule to the artifact store: it learns the protected checkpoints
from the acknowledgement of each checkpoint (`JournalAck.keep`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import Select, delete, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import CheckpointRow, JobRow
from zeta_core.contract.job.checkpoint import BEST_CHECKPOINT, surplus_checkpoints
from zeta_core.contract.job.events import CheckpointLine
from zeta_core.contract.job.status import UNFINISHED
from zeta_core.contract.spec.defaults import num_kept_checkpoints
from zeta_core.contract.spec.resolved_spec import ResolvedSpec

LATEST = "latest"
NEWEST_FIRST = (CheckpointRow.step.desc(), func.length(CheckpointRow.name).desc(), CheckpointRow.name)


def checkpoints_newest_first(job_id: str) -> Select[str]:
    """The names, highest step first; for equal steps, ``step-N`` first, because it has the training state."""
    return select(CheckpointRow.name).where(CheckpointRow.job_id == job_id).order_by(*NEWEST_FIRST)


async def newest_resumable(session: AsyncSession, job_id: str) -> str | None:
    """The newest checkpoint to resume from; never ``best``, which is replaced when a better one is found."""
    return await session.scalar(checkpoints_newest_first(job_id).where(CheckpointRow.name != BEST_CHECKPOINT).limit(1))


async def newest_resumable_of(session: AsyncSession, job_ids: Collection[str]) -> Mapping[str, str]:
    """The result of `newest_resumable` for each of these jobs that has such a checkpoint, with one statement."""
    rank = func.row_number().over(partition_by=CheckpointRow.job_id, order_by=NEWEST_FIRST).label("rank")
    ranked = select(CheckpointRow.job_id, CheckpointRow.name, rank).where(
        CheckpointRow.job_id.in_(job_ids), CheckpointRow.name != BEST_CHECKPOINT
    )
    newest = ranked.subquery()
    rows = await session.execute(select(newest.c.job_id, newest.c.name).where(newest.c.rank == 1))
    return {row.job_id: row.name for row in rows}


async def checkpoint_to_resume(session: AsyncSession, job: JobRow) -> str | None:
    """Where the next attempt continues, as ``job_.../name``: the job's newest checkpoint, or the one in its spec."""
    return await own_or_named_checkpoint(session, job, await newest_resumable(session, job.id))


async def own_or_named_checkpoint(session: AsyncSession, job: JobRow, own: str | None) -> str | None:
    """The result of `checkpoint_to_resume` if ``own`` is the job's newest checkpoint, which the caller has read."""
    if own is not None:
        return f"{job.id}/{own}"
    named = job.spec.get("resume_from_checkpoint")
    if not isinstance(named, str):
        return None
    other, _, name = named.partition("/")
    return f"{other}/{name or await newest_resumable(session, other) or 'final'}"


async def protected_checkpoints(session: AsyncSession, job: JobRow) -> set[str]:
    """The checkpoints of ``job`` that unfinished jobs resume by name, or start from with their weights."""
    resumes = JobRow.spec["resume_from_checkpoint"].as_string().startswith(f"{job.id}/", autoescape=True)
    starts = JobRow.resolved_spec_json["model"]["job"].as_string() == job.id
    unfinished = select(JobRow.spec, JobRow.resolved_spec_json).where(
        JobRow.status.in_(UNFINISHED), JobRow.project == job.project, or_(resumes, starts)
    )
    protected: set[str] = set()
    for spec, resolved in await session.execute(unfinished):
        other, _, name = str(spec.get("resume_from_checkpoint")).partition("/")
        if other == job.id:
            protected.add(name)
        model = ResolvedSpec.model_validate(resolved).job_model
        if model is not None and model.job == job.id:
            protected.add(model.checkpoint)
    return protected


async def record_checkpoint(
    session: AsyncSession, job: JobRow, line: CheckpointLine, *, attempt: int, protected: Collection[str]
) -> None:
    """Record a stored checkpoint, and delete the rows of those that exceed the job's ``save_total_limit``.

    A checkpoint of a higher step resets the counts of consecutive failures and lost workers.
    """
    newest = await session.scalar(select(func.max(CheckpointRow.step)).where(CheckpointRow.job_id == job.id))
    if newest is None or line.step > newest:
        job.failures = job.lost_workers = 0
    await session.merge(
        CheckpointRow(
            job_id=job.id,
            name=line.name,
            step=line.step,
            attempt=attempt,
            bytes=line.bytes,
            metrics=line.metrics,
            created_at=line.created_at,
        )
    )
    await session.flush()
    names = await session.scalars(select(CheckpointRow.name).where(CheckpointRow.job_id == job.id))
    removed = set(surplus_checkpoints(names, num_kept_checkpoints(job.spec, job.resolved_spec))) - set(protected)
    if removed:
        await session.execute(
            delete(CheckpointRow).where(CheckpointRow.job_id == job.id, CheckpointRow.name.in_(removed))
        )
