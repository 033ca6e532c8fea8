"""Creates jobs and changes their status; no other code assigns ``JobRow.status``.

A change names the status and the attempt that it expects. If the job's are different, nothing changes, which is a
normal result and not an error. Every change appends a ``status`` event in the same transaction, and stores the messages
to webhooks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database import events
from server.database.announcements import announce
from server.database.checkpoints import checkpoint_to_resume
from server.database.deferred_writes import deferred_writes
from server.database.object_removals import request_checkpoint_removal
from server.database.receipt_tables import ReceiptRow
from server.database.tables import AttemptRow, EventRow, JobRow
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import JobError, JobResult, WaitingReason
from zeta_core.contract.job.status import (
    ENDED,
    REASON_SENTENCES,
    TRANSITIONS,
    WAITING_SENTENCES,
    JobStatus,
    StatusReason,
    WaitingCode,
)
from zeta_core.contract.webhooks import JobEvent

END_EVENTS: Mapping[JobStatus, JobEvent] = {
    JobStatus.SUCCEEDED: "job.succeeded",
    JobStatus.FAILED: "job.failed",
    JobStatus.CANCELLED: "job.cancelled",
}
_LOCKED = "locked_jobs"  # in the `info` of a session: the result of `lock_jobs`


@dataclass(frozen=True)
class StatusChange:
    """A new status of a job and the contents of its ``status`` event.

    A job keeps ``error`` only if it ends with this change; the event always contains it.
    """

    status: JobStatus
    reason: StatusReason | None = None  # required if the job ends
    attempt_reason: StatusReason | None = None  # why the running attempt ended, if not for `reason`
    message: str | None = None  # default: the sentence of the reason
    error: JobError | None = None
    result: JobResult | None = None
    worker: str | None = None  # the worker that starts the attempt
    line: int | None = None  # the journal line that requested the change, if any
    at: datetime | None = None  # default: now


async def lock_jobs(session: AsyncSession, job_ids: Collection[str]) -> Mapping[str, JobRow]:
    """Lock the rows of these jobs with one statement, except those that another transaction has locked.

    The caller keeps the result until the transaction ends; `lock_job` then returns these rows without a statement.
    """
    query = select(JobRow).where(JobRow.id.in_(job_ids)).with_for_update(skip_locked=True)
    rows = {row.id: row for row in await session.scalars(query)}
    session.info[_LOCKED] = rows
    return rows


async def lock_job(session: AsyncSession, job_id: str) -> JobRow | None:
    """The job's row, locked until the transaction ends (SQLite: the write transaction itself is the lock)."""
    locked: Mapping[str, JobRow] = session.info.get(_LOCKED, {})
    if job_id in locked:
        return locked[job_id]
    query = select(JobRow).where(JobRow.id == job_id).with_for_update()
    return await session.scalar(query.execution_options(populate_existing=True))


async def create_jobs(
    session: AsyncSession, jobs: Sequence[JobRow], trace_parents: Mapping[str, str | None] = MappingProxyType({})
) -> None:
    """Insert new jobs as ``queued``, each with its first event, in two statements.

    ``trace_parents`` maps the ids of traced jobs to the trace context of their request, which the event records.
    """
    for job in jobs:
        job.status = JobStatus.QUEUED
        job.attempt = job.failures = job.lost_workers = 0
        job.num_save_requests = job.fulfilled_save_request = 0
        job.last_seq = 1
        job.queued_at = job.created_at
        job.warnings = []
    session.add_all(jobs)
    await session.flush()
    first = {"seq": 1, "attempt": 0, "line": None, "type": "status"}
    rows = [
        {
            **first,
            "job_id": job.id,
            "created_at": job.created_at,
            "fields": _first_event_fields(trace_parents.get(job.id)),
        }
        for job in jobs
    ]
    if rows:
        await session.execute(insert(EventRow), rows)


def _first_event_fields(trace_parent: str | None) -> dict[str, str]:
    """The fields of a job's first event."""
    return {"status": JobStatus.QUEUED, **({"trace_parent": trace_parent} if trace_parent else {})}


async def change_status(
    session: AsyncSession, job: JobRow, change: StatusChange, *, expect: Collection[JobStatus], attempt: int
) -> bool:
    """Change the status of ``job``, which `lock_job` has locked, and append its event.

    Returns whether the job had one of the statuses ``expect`` in this ``attempt``; otherwise nothing changes.
    """
    if JobStatus(job.status) not in expect or job.attempt != attempt:
        return False
    to, reason, now = change.status, change.reason, change.at or utc_now()
    assert to in TRANSITIONS[JobStatus(job.status)], f"the contract has no transition {job.status} -> {to}"
    if job.status == JobStatus.RUNNING:
        running = await session.get(AttemptRow, (job.id, attempt))
        assert running is not None, f"{job.id} runs attempt {attempt}, which has no row"
        running.finished_at, running.reason = now, change.attempt_reason or reason
    job.status = to
    job.status_reason = reason
    job.waiting_reason = _paused_reason(reason, now) if to == JobStatus.PAUSED else None
    if to != JobStatus.RUNNING:
        job.worker, job.slots, job.dispatched_at = None, None, None
        job.requested_action = None
    if to not in (JobStatus.RUNNING, JobStatus.QUEUED):  # otherwise, the next attempt saves what was requested
        job.fulfilled_save_request = job.num_save_requests
    if change.result is not None:
        job.result = change.result.model_dump(mode="json")
    error = change.error.model_dump(mode="json", exclude_none=True) if change.error is not None else None
    job.error = error if to in ENDED else None
    if to == JobStatus.QUEUED:
        job.queued_at, job.wait_announced_at = now, None
    if to in ENDED:
        job.finished_at = now
        assert reason is not None, f"{job.id} ends without a reason"
        deferred_writes(session).ends[reason] += 1
        session.add(ReceiptRow(job_id=job.id, created_at=now))  # `server.receipts` signs it
        if attempt:
            request_checkpoint_removal(session, job.id)
    message = change.message or (REASON_SENTENCES[reason] if reason else None)
    if to == JobStatus.QUEUED and job.attempt:
        message = f"{message or ''} {await _next_start(session, job)}".lstrip()
    fields = {"status": to.value, "reason": reason, "message": message, "error": error, "worker": change.worker}
    _append_event(session, job, attempt=attempt, at=now, fields=fields, line=change.line)
    if StatusReason.WORKER_LOST in (reason, change.attempt_reason):
        await announce(session, job, "job.worker_lost", at=now, message=message)
    if (end := END_EVENTS.get(to)) is not None:
        await announce(session, job, end, at=now, message=message)
    return True


def keep_paused(session: AsyncSession, job: JobRow) -> None:
    """Keep a locked job that waits for disk space paused until a user resumes it."""
    assert job.status == JobStatus.PAUSED, f"{job.id} is {job.status}"
    now, reason = utc_now(), StatusReason.PAUSED_BY_USER
    job.status_reason = reason
    job.waiting_reason = _paused_reason(reason, now)
    fields = {"status": job.status, "reason": reason, "message": REASON_SENTENCES[reason]}
    _append_event(session, job, attempt=job.attempt, at=now, fields=fields)


def _append_event(
    session: AsyncSession, job: JobRow, *, attempt: int, at: datetime, fields: dict[str, Any], line: int | None = None
) -> None:
    present = {name: value for name, value in fields.items() if value is not None}
    events.append(session, job, attempt=attempt, line=line, type="status", created_at=at, fields=present)


async def _next_start(session: AsyncSession, job: JobRow) -> str:
    """A sentence about where the next attempt of a job begins."""
    checkpoint = await checkpoint_to_resume(session, job)
    if checkpoint is None:
        return "There is no checkpoint yet, so the next attempt starts at the first step."
    return f"The next attempt continues from {checkpoint.removeprefix(f'{job.id}/')}."


def _paused_reason(reason: StatusReason | None, since: datetime) -> dict[str, Any]:
    codes = {StatusReason.DISK_FULL: WaitingCode.DISK, StatusReason.WAITS_FOR_SWEEP: WaitingCode.SWEEP}
    code = WaitingCode.PAUSED if reason is None else codes.get(reason, WaitingCode.PAUSED)
    return WaitingReason(code=code, message=WAITING_SENTENCES[code], since=since).model_dump(mode="json")
