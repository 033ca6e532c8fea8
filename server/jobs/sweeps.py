"""Reads and cancels sweeps. A sweep's jobs are ordinary jobs with its id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.pagination import OrderedQuery, PageQuery, newest_first, page
from server.database.tables import JobRow, SweepRow
from server.database.transitions import lock_job
from server.jobs.commands import apply_command
from server.service import Service
from zeta_core.contract.errors import Conflict
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.halving import Halving
from zeta_core.contract.job.responses import Page
from zeta_core.contract.job.status import ENDED, JobStatus
from zeta_core.contract.job.sweep import Settings, Sweep, SweepJob, SweepResult


async def list_sweeps(service: Service, caller: Caller, page_query: PageQuery) -> Page[Sweep]:
    """One page of the caller's sweeps, newest first."""
    async with service.database.read() as session:
        matches = OrderedQuery(
            select(SweepRow).where(SweepRow.project == caller.project), SweepRow.created_at, SweepRow.id
        )
        rows, has_more = await newest_first(session, SweepRow, [matches], page_query, project=caller.project)
        counted = select(JobRow.sweep, JobRow.status, func.count()).where(
            JobRow.sweep.in_([row.id for row in rows]), JobRow.deleted_at.is_(None)
        )
        counts: dict[str, dict[JobStatus, int]] = {row.id: {} for row in rows}
        for sweep_id, status, count in (await session.execute(counted.group_by(JobRow.sweep, JobRow.status))).all():
            if sweep_id is not None:
                counts[sweep_id][JobStatus(status)] = count
    return page([_summary(row, counts[row.id]) for row in rows], has_more, lambda sweep: sweep.id)


async def get_sweep(service: Service, caller: Caller, sweep_id: str) -> SweepResult:
    """A sweep with its jobs. Raises `NotFound`."""
    async with service.database.read() as session:
        sweep = await _find(session, caller, sweep_id)
        return to_result(sweep, await jobs_of(session, sweep.id))


async def cancel_sweep(service: Service, caller: Caller, sweep_id: str) -> SweepResult:
    """Cancel all unfinished jobs in one transaction. Raises `NotFound`, and `Conflict` if all jobs have ended."""
    async with service.database.write() as session:
        sweep = await _find(session, caller, sweep_id)
        cancelled: list[str] = []
        for job_id in sorted(job.id for job in await jobs_of(session, sweep.id) if job.status not in ENDED):
            row = await lock_job(session, job_id)
            if row is not None and row.status not in ENDED:
                await apply_command(service, session, row, "cancel")
                session.add(caller.audit_row("job.cancel", job_id, project=sweep.project, sweep=sweep.id))
                cancelled.append(job_id)
        if not cancelled:
            raise Conflict(f"All jobs of {sweep.id} have ended; there is nothing to cancel.", code="sweep_ended")
        await session.flush()
        result = to_result(sweep, await jobs_of(session, sweep.id))
    service.engine.wake()
    for job_id in cancelled:
        service.engine.event_signal.notify(job_id)
    return result


async def jobs_of(session: AsyncSession, sweep_id: str) -> Sequence[JobRow]:
    """The jobs of a sweep in the order of their creation, without deleted ones."""
    query = select(JobRow).where(JobRow.sweep == sweep_id, JobRow.deleted_at.is_(None))
    return (await session.scalars(query.order_by(JobRow.created_at, JobRow.id))).all()


def to_result(sweep: SweepRow, rows: Sequence[JobRow]) -> SweepResult:
    fields = list(sweep.request["grid"])
    jobs = [_sweep_job(row, fields) for row in rows]
    succeeded = [job for job in jobs if job.status == JobStatus.SUCCEEDED]
    by_eval = bool(succeeded) and all(job.eval_loss is not None for job in succeeded)
    measured = {job.id: loss for job in succeeded if (loss := job.eval_loss if by_eval else job.loss) is not None}
    return SweepResult(
        **_summary(sweep, Counter(job.status for job in jobs)).model_dump(),
        jobs=jobs,
        metric="eval_loss" if by_eval else "loss",
        best=min(measured, key=measured.__getitem__, default=None),
    )


async def _find(session: AsyncSession, caller: Caller, sweep_id: str) -> SweepRow:
    row = await session.get(SweepRow, sweep_id) if is_id(sweep_id, "sweep") else None
    if row is None or row.project != caller.project:
        raise caller.not_found("sweep", sweep_id, None if row is None else row.project)
    return row


def _summary(row: SweepRow, counts: dict[JobStatus, int]) -> Sweep:
    requested = row.request.get("halving")
    halving = None if requested is None else Halving.model_validate(requested)
    step = None if halving is None or row.next_comparison is None else halving.step_of(row.next_comparison)
    return Sweep(
        id=row.id,
        project=row.project,
        created_by=row.created_by,
        created_at=row.created_at,
        fields=list(row.request["grid"]),
        num_jobs=counts,
        halving=halving,
        next_comparison_step=step,
    )


def _sweep_job(row: JobRow, fields: Sequence[str]) -> SweepJob:
    progress, result = row.progress or {}, row.result or {}
    return SweepJob.model_validate(
        {
            "id": row.id,
            "settings": _settings(row.spec, fields),
            "status": row.status,
            "status_reason": row.status_reason,
            "step": progress.get("step"),
            "total_steps": progress.get("total_steps"),
            "loss": progress.get("recent_loss"),
            "eval_loss": result.get("eval_loss", progress.get("eval_loss")),
        }
    )


def _settings(spec: dict[str, Any], fields: Sequence[str]) -> Settings:
    """The values of the fields in a submitted spec."""
    settings: Settings = {}
    for field in fields:
        value: Any = spec
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None  # pyright: ignore[reportUnknownMemberType]
        settings[field] = value
    return settings
