"""What follows when an attempt ends: the job is over, waits, or is queued for its next attempt.

| the attempt ended with                                     | then                                                  |
|------------------------------------------------------------|-------------------------------------------------------|
| succeeded, cancelled                                       | the job has ended so                                  |
| paused: as ordered                                         | paused; queued again where the pause was withdrawn    |
| paused: `disk_full`                                        | paused until a worker has room; no failure            |
| queued: handed back                                        | queued, at once; no failure                           |
| failed: `train_error`, `process_killed`, `launch_failed`,  | queued, up to `max_retries` failures in a row         |
|   `stalled`                                                |                                                       |
| failed: `train_error`, `out_of_memory` with a code of      | failed                                                |
|   `LIES_IN_THE_SPEC`                                       |                                                       |
| failed: `out_of_memory` otherwise                          | queued once, failed the second time in the same job   |
| failed: `disk_full`                                        | paused until there is room, up to `max_retries`       |
| failed: `invalid_data`, `invalid_model`, `non_finite_loss` | failed: another attempt would meet it again           |
| failed: `time_limit`                                       | failed, with a checkpoint to go on from               |
| its worker is lost                                         | queued, up to `MAX_LOSSES` in a row; no failure       |

A job has an ``error`` only when it has ended with it. What failed in an attempt that is not the last is told by the
event of its end, by the attempt's ``reason``, and by a warning with its advice.

``failures`` counts failures in a row without a new checkpoint, ``losses`` the lost workers; a new checkpoint sets both
back. What the user ordered meanwhile (cancel, pause) comes before a retry, and before a failure too; nothing is tried
again when the job's ``time_limit_seconds`` is used up.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database import running_time
from server.database.events import warn
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import change_status
from zeta_core.contract.job.events import StatusLine, WarningLine, utc_now
from zeta_core.contract.job.job import JobError
from zeta_core.contract.job.status import ENDED, REASON_SENTENCES, JobStatus, StatusReason

MAX_LOSSES = 10
MAX_BACKOFF_SECONDS = 300.0
# Ends that another attempt may well not meet again. The user's own faults (data, model, a loss that is not finite) are
# not among them; memory that ran out is tried once more, because a neighbour may have had it.
RETRIED = frozenset(
    {
        StatusReason.TRAIN_ERROR,
        StatusReason.PROCESS_KILLED,
        StatusReason.LAUNCH_FAILED,
        StatusReason.STALLED,
        StatusReason.OUT_OF_MEMORY,
    }
)
# Errors that lie in the spec: the next attempt would meet them again.
LIES_IN_THE_SPEC = frozenset({"cannot_resume", "cannot_train", "cannot_fit", "invalid_spec", "invalid_request"})
RUNNING = frozenset({JobStatus.RUNNING})


def backoff_seconds(failures: int) -> float:
    """How long a job rests after so many failures in a row: not at all after the first, then 5, 20, 80, at most 300."""
    return 0.0 if failures <= 1 else min(MAX_BACKOFF_SECONDS, 5.0 * 4.0 ** (failures - 2))


async def end_attempt(session: AsyncSession, job: JobRow, *, attempt: int, line: int, said: StatusLine) -> None:
    """Apply the last line of the journal of the running ``attempt``; ``job`` is locked."""
    assert said.status != JobStatus.RUNNING, "only an ending ends an attempt"
    if said.status == JobStatus.FAILED:
        await _failed(session, job, attempt=attempt, line=line, said=said)
    elif said.status == JobStatus.QUEUED:
        await _queued_again(
            session, job, attempt, line=line, reason=said.reason or StatusReason.HANDED_BACK, message=said.message
        )
    elif said.status == JobStatus.PAUSED and job.requested_action != "pause":
        await _paused_unasked(session, job, attempt, line=line, said=said)
    else:
        if said.status == JobStatus.SUCCEEDED and said.result is not None:
            job.result = said.result.model_dump(mode="json")
        await _change(session, job, said.status, attempt, line=line, reason=_REASONS[said.status])


async def _paused_unasked(session: AsyncSession, job: JobRow, attempt: int, *, line: int, said: StatusLine) -> None:
    """The disk had no room; or the pause was withdrawn, or overruled by a cancel, while the training obeyed it."""
    if said.reason == StatusReason.DISK_FULL and job.requested_action is None:
        await _change(
            session, job, JobStatus.PAUSED, attempt, line=line, reason=StatusReason.DISK_FULL, message=said.message
        )
        return
    await _queued_again(
        session,
        job,
        attempt,
        line=line,
        reason=StatusReason.RESUMED,
        attempt_reason=said.reason or StatusReason.PAUSED_BY_USER,
    )


async def lose_worker(session: AsyncSession, job: JobRow, *, attempt: int, why: str) -> None:
    """The worker of the running ``attempt`` is gone, and with it the attempt; ``job`` is locked."""
    job.losses += 1
    lost = StatusReason.WORKER_LOST
    if job.losses > MAX_LOSSES and job.requested_action is None:
        error = JobError(code=lost, message=f"{why} {REASON_SENTENCES[lost]}")
        await _change(session, job, JobStatus.FAILED, attempt, reason=lost, message=why, error=error)
        return
    await _queued_again(
        session,
        job,
        attempt,
        reason=StatusReason.RETRYING,
        attempt_reason=lost,
        message=why,
    )


async def _failed(session: AsyncSession, job: JobRow, *, attempt: int, line: int, said: StatusLine) -> None:
    reason = said.reason or StatusReason.TRAIN_ERROR
    error = said.error or JobError(code=reason, message=said.message or REASON_SENTENCES[reason])
    job.failures += 1
    ordered = job.requested_action == "cancel" or (
        job.requested_action == "pause" and reason != StatusReason.TIME_LIMIT  # a job without time could not go on
    )
    if not ordered and reason == StatusReason.DISK_FULL and job.failures <= job.max_retries:
        await _change(
            session, job, JobStatus.PAUSED, attempt, line=line, reason=reason, message=said.message, error=error
        )
        return
    if ordered or await _is_tried_again(session, job, attempt, reason, error.code):
        await _queued_again(
            session,
            job,
            attempt,
            line=line,
            reason=StatusReason.RETRYING,
            attempt_reason=reason,
            message=error.message,
            error=error,
        )
        return
    await _change(session, job, JobStatus.FAILED, attempt, line=line, reason=reason, message=said.message, error=error)


async def _is_tried_again(session: AsyncSession, job: JobRow, attempt: int, reason: StatusReason, code: str) -> bool:
    """Whether another attempt may well not meet the failure again, and is still allowed."""
    if reason not in RETRIED or job.failures > job.max_retries:
        return False
    if code in LIES_IN_THE_SPEC:
        return False
    return reason != StatusReason.OUT_OF_MEMORY or not await _ran_out_of_memory_before(session, job, attempt)


async def _queued_again(
    session: AsyncSession,
    job: JobRow,
    attempt: int,
    *,
    reason: StatusReason,
    attempt_reason: StatusReason | None = None,
    line: int | None = None,
    message: str | None = None,
    error: JobError | None = None,
) -> None:
    """Queue the job for its next attempt, unless the user meanwhile asked for something else."""
    if job.requested_action is not None:
        to = JobStatus.CANCELLED if job.requested_action == "cancel" else JobStatus.PAUSED
        await _change(
            session, job, to, attempt, line=line, reason=_REASONS[to], attempt_reason=attempt_reason or reason
        )
        return
    if await running_time.is_used_up(session, job):
        await _out_of_time(session, job, attempt, line=line, attempt_reason=attempt_reason or reason)
        return
    rest = backoff_seconds(job.failures) if reason == StatusReason.RETRYING and job.failures else 0.0
    job.not_before = utc_now() + timedelta(seconds=rest) if rest else None
    await _change(
        session,
        job,
        JobStatus.QUEUED,
        attempt,
        line=line,
        reason=reason,
        attempt_reason=attempt_reason,
        message=message,
        error=error,
    )


async def _out_of_time(
    session: AsyncSession, job: JobRow, attempt: int, *, line: int | None, attempt_reason: StatusReason
) -> None:
    """The attempt ended for another reason, and there is no time for a next one."""
    reason = StatusReason.TIME_LIMIT
    error = JobError(code=reason, message=REASON_SENTENCES[reason])
    await _change(
        session, job, JobStatus.FAILED, attempt, line=line, reason=reason, attempt_reason=attempt_reason, error=error
    )


_REASONS: dict[JobStatus, StatusReason] = {
    JobStatus.SUCCEEDED: StatusReason.COMPLETED,
    JobStatus.CANCELLED: StatusReason.CANCELLED_BY_USER,
    JobStatus.PAUSED: StatusReason.PAUSED_BY_USER,
}


async def _change(
    session: AsyncSession,
    job: JobRow,
    to: JobStatus,
    attempt: int,
    *,
    reason: StatusReason,
    line: int | None = None,
    attempt_reason: StatusReason | None = None,
    message: str | None = None,
    error: JobError | None = None,
) -> None:
    changed = await change_status(
        session,
        job,
        to,
        expect=RUNNING,
        attempt=attempt,
        reason=reason,
        attempt_reason=attempt_reason,
        message=message,
        error=error,
        line=line,
    )
    assert changed is not None, f"{job.id} was looked at under its lock and is not running attempt {attempt}"
    if error is not None and to not in ENDED:
        warn(job, _of_the_attempt(attempt, error))


def _of_the_attempt(attempt: int, error: JobError) -> WarningLine:
    """What failed in an attempt that another one may follow."""
    return WarningLine(
        code="attempt_failed",
        message=f"Attempt {attempt} failed: {error.message}",
        hint=error.hint,
        patch=error.patch,
        evidence={"attempt": attempt, "code": error.code},
    )


async def _ran_out_of_memory_before(session: AsyncSession, job: JobRow, attempt: int) -> bool:
    earlier = select(AttemptRow.attempt).where(
        AttemptRow.job_id == job.id,
        AttemptRow.attempt < attempt,
        AttemptRow.reason == StatusReason.OUT_OF_MEMORY,
    )
    return await session.scalar(earlier.limit(1)) is not None
