"""The one door for a job's status: no other code assigns ``JobRow.status``.

A change is guarded by the status and the attempt it expects; one that finds something else changes nothing and says so
by returning ``None``, which is an answer and not an error. Every change is told to readers as a ``status`` event in
the same transaction.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from server.database import events
from server.database.checkpoints import resume_from
from server.database.tables import AttemptRow, JobEndRow, JobRow
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import JobError, WaitingReason
from zeta_core.contract.job.status import (
    ENDED,
    REASON_SENTENCES,
    TRANSITIONS,
    WAITING_SENTENCES,
    JobStatus,
    StatusReason,
    WaitingCode,
)


async def lock_job(session: AsyncSession, job_id: str) -> JobRow | None:
    """The job's row, locked until the transaction ends (SQLite: the write transaction itself is the lock)."""
    query = select(JobRow).where(JobRow.id == job_id).with_for_update()
    return await session.scalar(query.execution_options(populate_existing=True))


async def change_status(
    session: AsyncSession,
    job: JobRow,
    to: JobStatus,
    *,
    expect: Collection[JobStatus],
    attempt: int,
    reason: StatusReason | None = None,
    attempt_reason: StatusReason | None = None,
    message: str | None = None,
    error: JobError | None = None,
    line: int | None = None,
    created_at: datetime | None = None,
    details: dict[str, Any] | None = None,
) -> JobRow | None:
    """Move ``job`` (locked by `lock_job`) to ``to`` and append its ``status`` event; ``None`` if it is not as expected.

    ``attempt_reason`` says why the attempt ended where that differs from the job's ``reason`` (``process_killed``, and
    the job is ``retrying``). ``error`` says what failed: the event tells it, and it is the job's own only if the job
    ends with it. ``line`` is the journal line that asked for the change, or ``None`` for the server's own; ``details``
    are further fields of the event.
    """
    if JobStatus(job.status) not in expect or job.attempt != attempt:
        return None
    assert to in TRANSITIONS[JobStatus(job.status)], f"{job.status} -> {to} is no move of the contract"
    now = created_at or utc_now()
    if job.status == JobStatus.RUNNING:
        running = await session.get(AttemptRow, (job.id, attempt))
        assert running is not None, f"{job.id} runs attempt {attempt}, which has no row"
        running.finished_at, running.reason = now, attempt_reason or reason
    job.status = to
    job.status_reason = reason
    job.waiting_reason = _why_paused(reason, now) if to == JobStatus.PAUSED else None
    if to != JobStatus.RUNNING:
        job.worker, job.slots, job.handed_over_at = None, None, None
        job.requested_action = None
    told = error.model_dump(mode="json", exclude_none=True) if error is not None else None
    job.error = told if to in ENDED else None
    if to in ENDED:
        job.finished_at = now
        assert reason is not None, f"{job.id} ends without a reason"
        await _count_end(session, reason)
    said = message or (REASON_SENTENCES[reason] if reason else None)
    if to == JobStatus.QUEUED and job.attempt:
        said = f"{said or ''} {await _where_it_goes_on(session, job)}".lstrip()
    fields = {
        "status": to.value,
        "reason": reason,
        "message": said,
        "error": told,
    }
    await events.append(
        session,
        job,
        attempt=attempt,
        line=line,
        type="status",
        created_at=now,
        fields={name: value for name, value in {**fields, **(details or {})}.items() if value is not None},
    )
    return job


async def _count_end(session: AsyncSession, reason: StatusReason) -> None:
    """One more job that ended so; the row is made by whoever needs it first."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    first = insert(JobEndRow).values(reason=reason, count=1)
    await session.execute(
        first.on_conflict_do_update(index_elements=[JobEndRow.reason], set_={"count": JobEndRow.count + 1})
    )


async def _where_it_goes_on(session: AsyncSession, job: JobRow) -> str:
    """Where the next attempt of a job that was started before begins."""
    checkpoint = await resume_from(session, job)
    if checkpoint is None:
        return "There is no checkpoint yet: the next attempt begins at the first step."
    return f"The next attempt goes on from {checkpoint.removeprefix(f'{job.id}/')}."


async def hold(session: AsyncSession, job: JobRow) -> None:
    """Keep a job that is paused until the disk has room (locked by `lock_job`) paused until it is resumed."""
    assert job.status == JobStatus.PAUSED, f"{job.id} is {job.status}"
    now, reason = utc_now(), StatusReason.PAUSED_BY_USER
    job.status_reason = reason
    job.waiting_reason = _why_paused(reason, now)
    fields = {"status": job.status, "reason": reason, "message": REASON_SENTENCES[reason]}
    await events.append(session, job, attempt=job.attempt, line=None, type="status", created_at=now, fields=fields)


def _why_paused(reason: StatusReason | None, since: datetime) -> dict[str, Any]:
    code = WaitingCode.DISK if reason == StatusReason.DISK_FULL else WaitingCode.PAUSED
    return WaitingReason(code=code, message=WAITING_SENTENCES[code], since=since).model_dump(mode="json")
