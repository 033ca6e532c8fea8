"""Decides how a job continues after an attempt has ended: the job ends, is paused, or is queued for its next attempt.

| end of the attempt                                         | the job is then                                       |
|------------------------------------------------------------|-------------------------------------------------------|
| succeeded, cancelled                                       | succeeded, cancelled                                  |
| paused, as requested by the user or for its sweep          | paused; queued if the pause was withdrawn             |
| paused: `disk_full`                                        | paused until a worker has space, longer each time in  |
|                                                            |   a row; not a failure                                |
| queued: handed back                                        | queued immediately; not a failure                     |
| failed: `train_error`, `process_killed`, `launch_failed`,  | queued, up to `max_retries` consecutive failures      |
|   `stalled`, `node_lost`                                   |                                                       |
| failed: `train_error`, `out_of_memory` with one of the     | failed                                                |
|   `LASTING_ERRORS`                                         |                                                       |
| failed: `out_of_memory` otherwise                          | queued once; failed the second time in the same job   |
| failed: `disk_full`                                        | paused until there is space, up to `max_retries`      |
| failed: `invalid_data`, `invalid_model`,                   | failed: every attempt would fail                      |
|   `non_finite_loss`, `export_rejected`                     |                                                       |
| failed: `time_limit`                                       | failed, with a checkpoint to resume from              |
| lost worker                                                | queued, up to `MAX_LOST_WORKERS` consecutive ones;    |
|                                                            |   not a failure                                       |
| several workers that were not all ready                    | queued after a back-off; not a failure                |

A job has an ``error`` only if it has ended with it. The failure of an earlier attempt is recorded in the attempt's last
event, in its ``reason``, and in a warning.

``failures`` and ``lost_workers`` count consecutive failures and lost workers; a new checkpoint resets both. A request
(cancel, pause, wait for the sweep) takes precedence over a retry and over a failure. There is no retry once the job has
used up its ``time_limit_seconds``.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import takewhile

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database import time_limits
from server.database.events import warn
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import StatusChange, change_status
from zeta_core.contract.job.events import StatusLine, WarningLine, utc_now
from zeta_core.contract.job.job import JobError, WaitingReason
from zeta_core.contract.job.status import ENDED, REASON_SENTENCES, JobStatus, StatusReason, WaitingCode

MAX_LOST_WORKERS = 10
MAX_BACKOFF_SECONDS = 300.0
MAX_COUNTED_ATTEMPTS = 10  # attempts in a row with the same end; the back-off has reached its maximum long before
# Failures that another attempt may avoid. The user's errors (data, model, a loss that isn't finite) are not among them.
# An out-of-memory error is retried once, because another process may have used the memory.
RETRIED_REASONS = frozenset(
    {
        StatusReason.TRAIN_ERROR,
        StatusReason.PROCESS_KILLED,
        StatusReason.LAUNCH_FAILED,
        StatusReason.STALLED,
        StatusReason.NODE_LOST,
        StatusReason.OUT_OF_MEMORY,
    }
)
# Codes of errors with which every attempt would fail, most of them errors in the spec.
LASTING_ERRORS = frozenset(
    {"cannot_resume", "cannot_train", "cannot_fit", "file_limit", "invalid_spec", "invalid_request", "process_limit"}
)
_PAUSES = ("pause", "wait_for_sweep")


def backoff_seconds(failures: int) -> float:
    """The delay before the next attempt after this many consecutive failures: 0, 5, 20, 80, then 300 seconds."""
    return 0.0 if failures <= 1 else min(MAX_BACKOFF_SECONDS, 5.0 * 4.0 ** (failures - 2))


async def end_attempt(session: AsyncSession, job: JobRow, last: StatusLine, *, line: int | None) -> None:
    """Apply the last line of the running attempt's journal, with the number ``line``; ``job`` is locked.

    ``line`` is ``None`` if the line is not that of the journal whose events are stored.
    """
    assert last.status != JobStatus.RUNNING, "this status doesn't end an attempt"
    match last.status:
        case JobStatus.FAILED:
            await _end_failed(session, job, last, line)
        case JobStatus.QUEUED:
            reason = last.reason or StatusReason.HANDED_BACK
            await _requeue(session, job, StatusChange(last.status, reason, message=last.message, line=line))
        case JobStatus.PAUSED if job.requested_action not in _PAUSES:
            await _end_unrequested_pause(session, job, last, line)
        case _:
            result = last.result if last.status == JobStatus.SUCCEEDED else None
            await _apply(session, job, StatusChange(last.status, _reason(job, last.status), result=result, line=line))


async def lose_worker(session: AsyncSession, job: JobRow, *, message: str) -> None:
    """End the running attempt, whose worker is lost; ``job`` is locked."""
    job.lost_workers += 1
    lost = StatusReason.WORKER_LOST
    if job.lost_workers > MAX_LOST_WORKERS and job.requested_action is None:
        error = JobError(code=lost, message=f"{message} {REASON_SENTENCES[lost]}")
        await _apply(session, job, StatusChange(JobStatus.FAILED, lost, message=message, error=error))
        return
    retry = StatusChange(JobStatus.QUEUED, StatusReason.RETRYING, attempt_reason=lost, message=message)
    await _requeue(session, job, retry)


async def give_up_start(session: AsyncSession, job: JobRow, *, message: str) -> None:
    """End the running attempt, whose workers were not all ready to start; ``job`` is locked.

    It is not a failure of the job. The next attempt starts after a back-off, which grows with each one in a row that
    could not start.
    """
    reason = StatusReason.NODES_NOT_READY
    number = 1 + await attempts_in_a_row(session, job.id, reason, until=job.attempt - 1)
    retry = StatusChange(JobStatus.QUEUED, StatusReason.RETRYING, attempt_reason=reason, message=message)
    await _requeue(session, job, retry, delay_seconds=backoff_seconds(number + 1))
    if job.status == JobStatus.QUEUED and job.not_before is not None:
        code, until = WaitingCode.RETRY_BACKOFF, job.not_before.isoformat()
        text = f"{message} The next attempt starts after a delay."
        waiting = WaitingReason(code=code, message=text, since=utc_now(), details={"until": until})
        job.waiting_reason = waiting.model_dump(mode="json")


async def attempts_in_a_row(session: AsyncSession, job_id: str, reason: StatusReason, *, until: int) -> int:
    """How many attempts in a row, the last of them ``until``, ended for this reason; at most `MAX_COUNTED_ATTEMPTS`."""
    query = select(AttemptRow.reason).where(AttemptRow.job_id == job_id, AttemptRow.attempt <= until)
    earlier = await session.scalars(query.order_by(AttemptRow.attempt.desc()).limit(MAX_COUNTED_ATTEMPTS))
    return sum(1 for _ in takewhile(lambda other: other == reason, earlier))


def _reason(job: JobRow, to: JobStatus) -> StatusReason:
    """The reason of a status that a run reports or a request determines."""
    match to:
        case JobStatus.SUCCEEDED:
            return StatusReason.COMPLETED
        case JobStatus.CANCELLED:
            return StatusReason.CANCELLED_BY_USER
        case _:
            assert to == JobStatus.PAUSED, f"{to} has several reasons"
            is_for_sweep = job.requested_action == "wait_for_sweep"
            return StatusReason.WAITS_FOR_SWEEP if is_for_sweep else StatusReason.PAUSED_BY_USER


async def _end_unrequested_pause(session: AsyncSession, job: JobRow, last: StatusLine, line: int | None) -> None:
    """End an attempt that paused without a request: the disk is full, or the pause was withdrawn or replaced."""
    if last.reason == StatusReason.DISK_FULL and job.requested_action is None:
        await _apply(session, job, StatusChange(JobStatus.PAUSED, last.reason, message=last.message, line=line))
        return
    ended = last.reason or StatusReason.PAUSED_BY_USER
    await _requeue(session, job, StatusChange(JobStatus.QUEUED, StatusReason.RESUMED, attempt_reason=ended, line=line))


async def _end_failed(session: AsyncSession, job: JobRow, last: StatusLine, line: int | None) -> None:
    reason = last.reason or StatusReason.TRAIN_ERROR
    error = last.error or JobError(code=reason, message=last.message or REASON_SENTENCES[reason])
    job.failures += 1
    stops = job.requested_action == "cancel" or (
        job.requested_action in _PAUSES and reason != StatusReason.TIME_LIMIT  # there is no time left to resume it
    )
    failure = StatusChange(JobStatus.FAILED, reason, message=last.message, error=error, line=line)
    if not stops and reason == StatusReason.DISK_FULL and job.failures <= job.max_retries:
        await _apply(session, job, replace(failure, status=JobStatus.PAUSED))
    elif stops or await _is_retried(session, job, reason, error.code):
        retry = StatusChange(
            JobStatus.QUEUED,
            StatusReason.RETRYING,
            attempt_reason=reason,
            message=error.message,
            error=error,
            line=line,
        )
        await _requeue(session, job, retry)
    else:
        await _apply(session, job, failure)


async def _is_retried(session: AsyncSession, job: JobRow, reason: StatusReason, code: str) -> bool:
    """Whether another attempt is allowed and may avoid the failure."""
    if reason not in RETRIED_REASONS or job.failures > job.max_retries or code in LASTING_ERRORS:
        return False
    return reason != StatusReason.OUT_OF_MEMORY or not await _ran_out_of_memory_before(session, job)


async def _requeue(
    session: AsyncSession, job: JobRow, change: StatusChange, *, delay_seconds: float | None = None
) -> None:
    """Queue the job for its next attempt, unless the user has requested something else or no time is left.

    ``delay_seconds`` is the time before that attempt, by default the back-off after the job's failures.
    """
    ended = change.attempt_reason or change.reason
    if job.requested_action is not None:
        to = JobStatus.CANCELLED if job.requested_action == "cancel" else JobStatus.PAUSED
        await _apply(session, job, StatusChange(to, _reason(job, to), attempt_reason=ended, line=change.line))
        return
    if await time_limits.has_reached_time_limit(session, job):
        limit = StatusReason.TIME_LIMIT
        error = JobError(code=limit, message=REASON_SENTENCES[limit])
        failure = StatusChange(JobStatus.FAILED, limit, attempt_reason=ended, error=error, line=change.line)
        await _apply(session, job, failure)
        return
    is_retry = change.reason == StatusReason.RETRYING and job.failures
    delay = delay_seconds if delay_seconds is not None else backoff_seconds(job.failures) if is_retry else 0.0
    job.not_before = utc_now() + timedelta(seconds=delay) if delay else None
    await _apply(session, job, change)


async def _apply(session: AsyncSession, job: JobRow, change: StatusChange) -> None:
    attempt = job.attempt
    is_changed = await change_status(session, job, change, expect={JobStatus.RUNNING}, attempt=attempt)
    assert is_changed, f"{job.id} is locked and was running"
    if change.error is not None and change.status not in ENDED:
        warn(job, _failed_attempt(attempt, change.error))


def _failed_attempt(attempt: int, error: JobError) -> WarningLine:
    """A warning about an attempt whose job has not ended."""
    return WarningLine(
        code="attempt_failed",
        message=f"Attempt {attempt} failed: {error.message}",
        hint=error.hint,
        patch=error.patch,
        evidence={"attempt": attempt, "code": error.code},
    )


async def _ran_out_of_memory_before(session: AsyncSession, job: JobRow) -> bool:
    earlier = select(AttemptRow.attempt).where(
        AttemptRow.job_id == job.id,
        AttemptRow.attempt < job.attempt,
        AttemptRow.reason == StatusReason.OUT_OF_MEMORY,
    )
    return await session.scalar(earlier.limit(1)) is not None
