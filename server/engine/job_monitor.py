"""Monitors running jobs: repeats stop requests until they take effect, and ends attempts whose worker is lost.

`lost_attempts` defines when an attempt is lost. Attempts on several workers are monitored by `nodes.monitor`. If a
worker still lists an attempt that has ended, it receives a fenced acknowledgement and kills the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database
from server.database.draining import drained_workers
from server.database.placements import unreleased_placements
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import StatusChange, change_status, lock_job
from server.engine.endings import attempts_in_a_row, backoff_seconds, lose_worker
from server.engine.loops import Pass, raise_first, try_each
from server.engine.lost_attempts import UNLISTED_SECONDS, ClaimedAttempt
from server.engine.monitor_resources import MonitorResources
from server.engine.save_requests import due_save_requests
from server.engine.stop_requests import RUNNING, Nodes, StopRequests
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.contract.wire.messages import (
    SAVE_VERSION,
    Heartbeat,
    JournalAck,
    SaveRequest,
    StopRequest,
)

# A job whose checkpoint doesn't fit would restart continuously on a disk that counts as free, or with a bucket that is
# full, which no worker can measure. Therefore it is paused for at least this long, and longer each time in a row.
DISK_PAUSE_SECONDS = 10.0
DISK_MESSAGE = "Disk space is available again."

logger = logging.getLogger(__name__)


class JobMonitor:
    def __init__(self, resources: MonitorResources) -> None:
        self._database = resources.database
        self._workers = resources.workers
        self._secrets = resources.secrets
        self._send_to_worker = resources.send_to_worker
        self._event_signal = resources.event_signal
        self._slot_freed = resources.slot_freed
        self._stop_requests = StopRequests(resources.database)
        self._lost = resources.lost_attempts()
        self._stale_since: dict[tuple[str, str, int], float] = {}  # monotonic

    def passes(self) -> dict[str, Pass]:
        """The passes by name. Each runs in its own loop, so that a failure in one does not affect the others."""
        return {
            "stop requests": self._send_stop_requests,
            "lost workers": self._end_lost_attempts,
            "stale attempts": self._fence_stale_attempts,
            "disk space": self._resume_paused_by_disk,
        }

    async def _send_stop_requests(self) -> None:
        if not self._workers.is_connected:
            return
        running, nodes, drained = await self._read()

        async def send(due: tuple[str, StopRequest | SaveRequest]) -> None:
            await self._send_to_worker(*due)

        stops = await self._stop_requests.due(running, nodes, drained)
        saves = [due for due in due_save_requests(running, nodes) if self._can_save(due[0])]
        raise_first(await try_each([*stops, *saves], send))

    def _can_save(self, worker: str) -> bool:
        """Whether the worker understands `SaveRequest`."""
        beat = self._workers.get(worker)
        return beat is not None and beat.contract_version >= SAVE_VERSION

    async def _resume_paused_by_disk(self) -> None:
        if not self._workers.is_connected:
            return
        _, _, drained = await self._read()
        if any(self._takes_jobs(beat) and beat.worker not in drained for beat in self._workers.workers()):
            for job_id in await resume_paused_by_disk(self._database):
                self._event_signal.notify(job_id)
                self._slot_freed()

    async def _read(self) -> tuple[Sequence[Any], Nodes, Collection[str]]:
        """The running attempts, the workers of those on several workers, and the drained workers."""
        async with self._database.read() as session:
            running = (await session.execute(RUNNING)).all()
            return running, await _read_nodes(session), await drained_workers(session)

    def _takes_jobs(self, beat: Heartbeat) -> bool:
        return self._workers.is_alive(beat.worker) and not beat.stopping and not beat.disk_low

    async def _end_lost_attempts(self) -> None:
        if not self._workers.is_connected:
            return
        running, _, _ = await self._read()
        claimed = {
            ClaimedAttempt(row.id, row.attempt, row.worker, row.incarnation) for row in running if row.num_nodes == 1
        }

        async def end(lost: tuple[ClaimedAttempt, str]) -> None:
            attempt, message = lost
            await self._end_lost_attempt(attempt.job_id, attempt.attempt, message)
            if self._secrets.is_revoked(attempt.worker):
                ended = JournalAck(job_id=attempt.job_id, attempt=attempt.attempt, stored_line=0, fenced=True)
                await self._send_to_worker(attempt.worker, ended)

        raise_first(await try_each(self._lost.find(claimed).items(), end))

    async def _end_lost_attempt(self, job_id: str, attempt: int, message: str) -> None:
        async with self._database.write() as session:
            job = await lock_job(session, job_id)
            if job is None or job.status != JobStatus.RUNNING or job.attempt != attempt:
                return
            await lose_worker(session, job, message=message)
        logger.warning(
            "Lost attempt %d of %s. %s",
            attempt,
            job_id,
            message,
            extra={"action": "worker_lost", "job_id": job_id, "attempt": attempt},
        )
        self._event_signal.notify(job_id)
        self._slot_freed()

    async def _fence_stale_attempts(self) -> None:
        """Make workers end attempts that are over, such as those of a worker that was declared lost."""
        if not self._workers.is_connected:
            return
        listed = {
            (beat.worker, slot.job_id, slot.attempt)
            for beat in self._workers.workers()
            if self._workers.is_alive(beat.worker)
            for slot in beat.all_slots
            if slot.job_id is not None and slot.attempt is not None
        }
        if not listed:
            self._stale_since = {}
            return
        ids = {job_id for _, job_id, _ in listed}
        async with self._database.read() as session:
            jobs = {job.id: job for job in (await session.execute(_STATES.where(JobRow.id.in_(ids)))).all()}
            lines: dict[tuple[str, int], int] = {
                (job_id, attempt): line
                for job_id, attempt, line in await session.execute(_LINES.where(AttemptRow.job_id.in_(ids)))
            }
            nodes = await _read_nodes(session)
        now = time.monotonic()
        stale: dict[tuple[str, str, int], float] = {}
        for key in listed:
            worker, job_id, attempt = key
            job = jobs.get(job_id)
            is_current = (
                job is not None
                and worker in nodes.get((job_id, attempt), (job.worker,))
                and (
                    (job.status == JobStatus.RUNNING and job.attempt == attempt)
                    or (job.status == JobStatus.QUEUED and job.attempt + 1 == attempt)
                )
            )
            if is_current:
                continue
            stale[key] = self._stale_since.get(key, now)
            if now - stale[key] > UNLISTED_SECONDS:
                stored_line = lines.get((job_id, attempt), 0)
                ack = JournalAck(job_id=job_id, attempt=attempt, stored_line=stored_line, fenced=True)
                await self._send_to_worker(worker, ack)
        self._stale_since = stale


_STATES = select(JobRow.id, JobRow.status, JobRow.attempt, JobRow.worker)
# Attempts on several workers are left out, because each node has its own journal. Their acknowledgement says that
# no line is stored, so a worker does not consider its node complete, and kills it.
_LINES = select(AttemptRow.job_id, AttemptRow.attempt, AttemptRow.stored_line).where(AttemptRow.num_nodes == 1)


async def _read_nodes(session: AsyncSession) -> Nodes:
    nodes: dict[tuple[str, int], list[str]] = {}
    for row in await unreleased_placements(session):
        nodes.setdefault((row.job_id, row.attempt), []).append(row.worker)
    return nodes


async def resume_paused_by_disk(database: Database) -> list[str]:
    """Queue the jobs that a full disk paused at least `DISK_PAUSE_SECONDS` ago; returns their ids.

    A job that a full disk has paused several times in a row waits longer, as after failures. Call it only when a worker
    has free space.
    """
    waiting = select(JobRow.id, JobRow.attempt, JobRow.waiting_reason).where(
        JobRow.status == JobStatus.PAUSED, JobRow.status_reason == StatusReason.DISK_FULL
    )
    async with database.read() as session:
        rows = (await session.execute(waiting)).all()
    now = utc_now()
    queued: list[str] = []

    async def resume(row: Any) -> None:
        job_id, attempt, reason = row
        since = datetime.fromisoformat((reason or {})["since"])
        if now - timedelta(seconds=DISK_PAUSE_SECONDS) < since <= now:  # a future time comes from another clock
            return
        async with database.read() as session:
            pauses = await attempts_in_a_row(session, job_id, StatusReason.DISK_FULL, until=attempt)
        if now - timedelta(seconds=backoff_seconds(pauses)) < since <= now:
            return
        async with database.write() as session:
            job = await lock_job(session, job_id)
            if job is None or job.status_reason != StatusReason.DISK_FULL:
                return
            change = StatusChange(JobStatus.QUEUED, StatusReason.RESUMED, message=DISK_MESSAGE)
            if await change_status(session, job, change, expect={JobStatus.PAUSED}, attempt=job.attempt):
                queued.append(job_id)

    raise_first(await try_each(rows, resume))
    return queued
