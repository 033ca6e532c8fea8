"""Runs the commands cancel, pause, resume and checkpoint, as `contract.job.commands` defines them.

Each command is one transaction.

An idle job changes immediately. For a running job, the command is stored in ``requested_action`` until the attempt has
ended: the engine repeats the stop request, and `engine.endings` applies the requested status. A request to save is
repeated until the job has stored a checkpoint for it.
"""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database import time_limits
from server.database.tables import JobRow
from server.database.transitions import StatusChange, change_status, keep_paused
from server.jobs.queries import find_job
from server.jobs.serialization import to_job
from server.service import Service
from zeta_core.contract.errors import Conflict
from zeta_core.contract.job.commands import COMMAND_TABLE, Accepted, Command, Effect, job_situation
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import KINDS, JobKind
from zeta_core.contract.job.status import REQUESTED_ACTIONS, JobStatus, StatusReason
from zeta_core.contract.wire.messages import SAVE_VERSION


async def run_command(service: Service, caller: Caller, job_id: str, command: Command) -> Job:
    """The job after the command. Raises `NotFound`, and `Conflict` if the command isn't possible in its status."""
    async with service.database.write() as session:
        row = await find_job(session, caller, job_id, lock=True)
        await apply_command(service, session, row, command)
        session.add(caller.audit_row(f"job.{command}", row.id, project=row.project))
        await session.flush()
        job = await to_job(session, row)
    service.engine.wake()
    service.engine.event_signal.notify(job_id)
    return job


async def apply_command(service: Service, session: AsyncSession, row: JobRow, command: Command) -> None:
    """Apply the command to a locked job in this transaction. Raises `Conflict` if the command is rejected."""
    await _apply_effect(service, session, row, require_accepted(row, command).effect)


def require_accepted(row: JobRow, command: Command) -> Accepted:
    """The effect of the command in the job's current situation. Raises `Conflict` if the command is rejected."""
    reason = StatusReason(row.status_reason) if row.status_reason else None
    action = row.requested_action
    assert action in (None, *REQUESTED_ACTIONS), f"{row.id} has the unknown request {action!r}"
    if command == "checkpoint" and not KINDS[JobKind(row.kind)].saves_checkpoints:
        raise Conflict(
            f"Job {row.id} is a job of kind {row.kind}; only a training can save a checkpoint.", code="not_a_training"
        )
    rule = COMMAND_TABLE[job_situation(JobStatus(row.status), reason, action)][command]
    if isinstance(rule, Accepted):
        return rule
    raise Conflict(rule.sentence.format(id=row.id, status=row.status), code=rule.code)


async def _apply_effect(service: Service, session: AsyncSession, row: JobRow, effect: Effect) -> None:
    match effect:
        case Effect.CANCEL:
            await _change(session, row, JobStatus.CANCELLED, StatusReason.CANCELLED_BY_USER)
        case Effect.PAUSE:
            await _change(session, row, JobStatus.PAUSED, StatusReason.PAUSED_BY_USER)
        case Effect.REQUEST_CANCEL:
            row.requested_action = "cancel"
        case Effect.REQUEST_PAUSE:
            row.requested_action = "pause"
        case Effect.REQUEST_SAVE:
            _require_saving_worker(service, row)
            row.num_save_requests += 1
        case Effect.WITHDRAW_PAUSE:
            row.requested_action = None
        case Effect.KEEP_PAUSED:
            keep_paused(session, row)
        case Effect.QUEUE:
            await _require_time_left(session, row)
            row.not_before = None
            await _change(session, row, JobStatus.QUEUED, StatusReason.RESUMED)
            row.waiting_reason = service.engine.waiting_reason_of(row)
        case Effect.NOTHING:
            pass
        case Effect.DELETE | Effect.RERUN:
            raise AssertionError(f"{effect!r} is not handled here")


def _require_saving_worker(service: Service, row: JobRow) -> None:
    """Raise `Conflict` if the job's worker runs a version that cannot save on request."""
    beat = next((beat for beat in service.engine.workers() if beat.worker == row.worker), None)
    if beat is not None and beat.contract_version < SAVE_VERSION:
        raise Conflict(
            f"Worker {row.worker} runs version {beat.version}, which can't save on request; upgrade it, or save by "
            f"pausing the job: `zeta pause {row.id}`, then `zeta resume {row.id}`.",
            code="worker_too_old",
        )


async def _change(session: AsyncSession, row: JobRow, to: JobStatus, reason: StatusReason) -> None:
    change = StatusChange(to, reason)
    is_changed = await change_status(
        session, row, change, expect={JobStatus.QUEUED, JobStatus.PAUSED}, attempt=row.attempt
    )
    assert is_changed, f"{row.id} is locked and was idle"


async def _require_time_left(session: AsyncSession, row: JobRow) -> None:
    """Raise `Conflict` if the job has no running time left."""
    if await time_limits.has_reached_time_limit(session, row):
        raise Conflict(
            f"Job {row.id} has used up its time_limit_seconds; rerun it with a larger one from its newest checkpoint: "
            f"`zeta rerun {row.id} --from latest --set time_limit_seconds=...`.",
            code="time_limit_used",
        )
