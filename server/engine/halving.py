"""Successive halving: pauses the jobs of a sweep at the step of a comparison, compares them, and continues the best.

A job that has reached the step is paused with the reason ``waits_for_sweep``, so that others can use its device. When
no job of the sweep is left that has not reached the step, the jobs are ranked by their losses up to this step. The best
ones are queued again and continue from their checkpoints, and the others are cancelled with the reason ``eliminated``.

A pass derives everything from the database: the number of the next comparison is in the sweep's row, the requests and
reasons are in its jobs, and the losses are in their events. One transaction makes a comparison, so a restart repeats
or continues it, and concurrent servers make it once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database
from server.database.tables import JobRow, SweepRow
from server.database.transitions import StatusChange, change_status, lock_job
from server.engine.event_signal import EventSignal
from server.engine.loops import raise_first, try_each
from server.engine.step_losses import losses_at
from zeta_core.contract.job.halving import Halving
from zeta_core.contract.job.status import ENDED, JobStatus, StatusReason

logger = logging.getLogger(__name__)


class SweepHalving:
    """Advances the sweeps with successive halving, all of them in each pass."""

    def __init__(self, database: Database, event_signal: EventSignal, wake: Callable[[], None]) -> None:
        """``wake`` is called after jobs were stopped or queued."""
        self._database = database
        self._event_signal = event_signal
        self._wake = wake

    async def one_pass(self) -> None:
        """Advance all sweeps with a comparison that has not been made."""
        waiting = select(SweepRow.id).where(SweepRow.next_comparison.is_not(None)).order_by(SweepRow.id)
        async with self._database.read() as session:
            ids = (await session.scalars(waiting)).all()
        raise_first(await try_each(ids, self._advance))

    async def _advance(self, sweep_id: str) -> None:
        async with self._database.read() as session:
            sweep = await session.get(SweepRow, sweep_id)
            if sweep is None or not _can_advance(sweep, await _jobs(session, sweep_id)):
                return
        async with self._database.write() as session:
            query = select(SweepRow).where(SweepRow.id == sweep_id).with_for_update()
            sweep = await session.scalar(query.execution_options(populate_existing=True))
            if sweep is None or sweep.next_comparison is None:
                return
            changed = await _advance_locked(session, sweep, await _lock_jobs(session, sweep_id))
        for job_id in changed:
            self._event_signal.notify(job_id)
        self._wake()


def _can_advance(sweep: SweepRow, jobs: Sequence[JobRow]) -> bool:
    """Whether a job must be paused, or the jobs can be compared, because each waits for it or has ended."""
    step = _step(sweep)
    return step is not None and (any(_must_pause(job, step) for job in jobs) or not any(map(_is_pending, jobs)))


async def _advance_locked(session: AsyncSession, sweep: SweepRow, jobs: Sequence[JobRow]) -> list[str]:
    """Pause jobs that have reached the step, or compare all jobs; returns the ids of the changed jobs."""
    step = _step(sweep)
    assert step is not None, f"{sweep.id} has no comparison left"
    reached = [job for job in jobs if _must_pause(job, step)]
    for job in reached:
        job.requested_action = "wait_for_sweep"
    if reached or any(map(_is_pending, jobs)):
        return [job.id for job in reached]
    return await _compare(session, sweep, jobs, step)


async def _compare(session: AsyncSession, sweep: SweepRow, jobs: Sequence[JobRow], step: int) -> list[str]:
    """Queue the best of the waiting jobs again, and cancel the others."""
    ranked = await _rank(session, [job for job in jobs if _is_waiting(job) or _succeeded_after(job, step)], step)
    num_kept = _halving(sweep).num_kept(len(ranked))
    changed: list[str] = []
    num_continued = 0
    for number, (job, loss) in enumerate(ranked, 1):
        if not _is_waiting(job):
            continue
        rank = f"Ranked {number} of {len(ranked)} in its sweep at step {step} ({loss}); the best {num_kept} continue."
        change = StatusChange(JobStatus.CANCELLED, StatusReason.ELIMINATED, message=rank)
        if number <= num_kept:
            num_continued += 1
            change = StatusChange(JobStatus.QUEUED, StatusReason.RESUMED, message=rank)
        is_changed = await change_status(session, job, change, expect={JobStatus.PAUSED}, attempt=job.attempt)
        assert is_changed, f"{job.id} is locked and was paused"
        changed.append(job.id)
    assert sweep.next_comparison is not None, f"{sweep.id} has no comparison left"
    sweep.next_comparison = sweep.next_comparison + 1 if num_continued > 1 else None
    logger.info(
        "Compared %d jobs of %s at step %d; %d continue.", len(ranked), sweep.id, step, num_continued,
        extra={"action": "sweep_compared", "sweep": sweep.id},
    )  # fmt: skip
    return changed


async def _rank(session: AsyncSession, jobs: Sequence[JobRow], step: int) -> list[tuple[JobRow, str]]:
    """The jobs, the best first, each with its loss as a text.

    They are compared by their losses on held-out data if each has one, otherwise by their mean losses over the last
    steps. A job without a loss is the last one, and of equal ones, the older one is better.
    """
    losses = {job.id: await losses_at(session, job.id, step) for job in jobs}
    by_eval = all(found.eval_loss is not None for found in losses.values())
    name = "eval_loss" if by_eval else "loss"
    values = {job_id: found.eval_loss if by_eval else found.loss for job_id, found in losses.items()}

    def key(job: JobRow) -> tuple[float, str]:
        value = values[job.id]
        return (math.inf if value is None else value, job.id)

    def text(value: float | None) -> str:
        return f"no {name}" if value is None else f"{name} {value:.4f}"

    return [(job, text(values[job.id])) for job in sorted(jobs, key=key)]


async def _jobs(session: AsyncSession, sweep_id: str) -> Sequence[JobRow]:
    query = select(JobRow).where(JobRow.sweep == sweep_id, JobRow.deleted_at.is_(None)).order_by(JobRow.id)
    return (await session.scalars(query)).all()


async def _lock_jobs(session: AsyncSession, sweep_id: str) -> list[JobRow]:
    """The jobs of the sweep, locked in the order of their ids, as when a sweep is cancelled."""
    rows = [await lock_job(session, job.id) for job in await _jobs(session, sweep_id)]
    return [row for row in rows if row is not None and row.deleted_at is None]


def _halving(sweep: SweepRow) -> Halving:
    return Halving.model_validate(sweep.request["halving"])


def _step(sweep: SweepRow) -> int | None:
    """The step of the next comparison; ``None`` if there is none."""
    return None if sweep.next_comparison is None else _halving(sweep).step_of(sweep.next_comparison)


def _must_pause(job: JobRow, step: int) -> bool:
    """Whether the job has reached the step, and is neither stopping nor at its end."""
    if job.status != JobStatus.RUNNING or job.requested_action is not None:
        return False
    progress = job.progress or {}
    total = progress.get("total_steps")
    return (progress.get("step") or 0) >= step and (total is None or step < total)


def _is_waiting(job: JobRow) -> bool:
    return job.status == JobStatus.PAUSED and job.status_reason == StatusReason.WAITS_FOR_SWEEP


def _is_pending(job: JobRow) -> bool:
    """Whether the comparison waits for the job."""
    return job.status not in ENDED and not _is_waiting(job)


def _succeeded_after(job: JobRow, step: int) -> bool:
    """Whether the job completed its run before it could be paused, so that it is compared, too."""
    return job.status == JobStatus.SUCCEEDED and ((job.progress or {}).get("step") or 0) >= step
