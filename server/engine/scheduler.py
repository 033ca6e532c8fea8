"""Chooses a worker for each queued job and hands the job over; keeps the reasons why the others wait.

The choice is committed before the message is sent, so a message is only ever about a choice that stands; one that is
not claimed in time, or whose worker is gone, is withdrawn and made again. A worker's free slots are those of its
heartbeat without the ones that the database knows to be taken.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.db import Database
from server.database.drains import drained_workers
from server.database.newest import resume_from
from server.database.state import lock_job
from server.database.tables import JobRow
from server.engine.endings import MAX_BACKOFF_SECONDS
from server.engine.fleet import Fleet
from server.engine.loops import raise_first, try_each
from server.engine.placement import Room, Wait, choose
from zeta_core.contract.events import utc_now
from zeta_core.contract.job import WAITING_SENTENCES, JobStatus, WaitingCode, WaitingReason
from zeta_core.contract.messages import HEARTBEAT_GONE_SECONDS, HandOver, Heartbeat
from zeta_core.contract.redis_access import RedisUnavailable
from zeta_core.contract.spec import Resources

SCHEDULING_LOCK = 0x7A657461  # "zeta", the key of PostgreSQL's advisory lock
UPDATE_CHUNK = 100
PAGE_JOBS = 200
EXPLAIN_SECONDS = 15.0

logger = logging.getLogger(__name__)
Queued = Any  # a row of `_COLUMNS`
Send = Callable[[HandOver], Awaitable[None]]


@dataclass
class _Load:
    """What the database says is running or handed over: slots by worker, and how many jobs by project."""

    slots: dict[str, set[int]]
    jobs: Counter[str]


class Scheduler:
    """``project_max_running``: so many jobs of a project at once, and its others wait; ``None``: no limit."""

    def __init__(
        self,
        database: Database,
        fleet: Fleet,
        send: Send,
        *,
        claim_seconds: float,
        project_max_running: int | None = None,
    ) -> None:
        self._project_max_running = project_max_running
        self._database = database
        self._fleet = fleet
        self._send = send
        self._claim_seconds = claim_seconds
        self._handed_over: dict[tuple[str, datetime], float] = {}  # when this process first saw it, monotonic
        self._explain_all_at = 0.0

    async def one_pass(self) -> None:
        """Withdraw what was not claimed, then go through the queue in its order.

        The queue is read a page at a time. When no slot is free any more, the jobs behind the first page can only be
        told why they wait, which is done every `EXPLAIN_SECONDS`.
        """
        if not self._fleet.looked:
            return  # the server has just started and knows nothing of Redis yet
        async with self._database.read() as session:
            given: Sequence[Queued] = (await session.execute(_COLUMNS.where(JobRow.worker.is_not(None)))).all()
            load = await _load(session)
            drained = await drained_workers(session)
        await self._withdraw_unclaimed(given)
        rooms = [
            Room(beat, _free_slots(beat, load.slots.get(beat.worker, set())), _closed(beat, drained))
            for beat in self._fleet.workers()
            if self._fleet.is_alive(beat.worker) and not beat.stopping
        ]
        explain_all = time.monotonic() >= self._explain_all_at
        last: Queued | None = None
        failures: list[Exception | None] = []
        while True:
            query = _WAITING if last is None else _WAITING.where(_behind(last))
            async with self._database.read() as session:
                page: Sequence[Queued] = (await session.execute(query)).all()
            failures.append(await self._go_through(page, rooms, load.jobs))
            if len(page) < PAGE_JOBS or not (explain_all or any(room.free and room.closed is None for room in rooms)):
                break
            last = page[-1]
        if explain_all:
            self._explain_all_at = time.monotonic() + EXPLAIN_SECONDS
        raise_first(*failures)

    async def _go_through(self, page: Sequence[Queued], rooms: list[Room], running: Counter[str]) -> Exception | None:
        """Hand over what fits, and say why the rest of the page waits; ``running`` jobs of each project.

        Returns the first failure: a row that fails holds up no other.
        """
        waits: list[tuple[Queued, Wait]] = []
        now = utc_now()

        async def consider(row: Queued) -> None:
            if not self._fleet.watching:
                waits.append((row, _REDIS_AWAY))
                return
            # What is further away than any back-off is of a clock that has jumped back since.
            if row.not_before is not None and 0 < (row.not_before - now).total_seconds() <= MAX_BACKOFF_SECONDS:
                waits.append((row, Wait(WaitingCode.RETRY_BACKOFF, (("until", row.not_before.isoformat()),))))
                return
            resources = _resources(row)
            choice = choose(
                rooms,
                resources,
                threads=_threads(row, resources),
                timed=row.time_limit is not None,
                device_kind=row.device_kind if isinstance(row.device_kind, str) else None,
            )
            if isinstance(choice, Wait):
                waits.append((row, choice))
                return
            if self._is_full(running[row.project]):
                waits.append((row, Wait(WaitingCode.QUOTA, (("limit", self._project_max_running),))))
                return
            room, slots = choice
            running[row.project] += 1
            room.free = [slot for slot in room.free if slot not in slots]
            await self._hand_over(row.id, row.attempt, room.heartbeat, slots, gpus=room.gpus_for(resources))

        failure = await try_each(page, consider)
        await self._explain(waits)
        return failure

    def _is_full(self, running: int) -> bool:
        return self._project_max_running is not None and running >= self._project_max_running

    async def _withdraw_unclaimed(self, given: Sequence[Queued]) -> None:
        """Take back what was not claimed in time; it is handed over again in this pass or a later one."""
        now = time.monotonic()
        rows = {(row.id, row.handed_over_at): row for row in given}
        self._handed_over = {key: self._handed_over.get(key, now) for key in rows}
        for key, row in rows.items():
            too_old = now - self._handed_over[key] > self._claim_seconds
            gone = self._fleet.silent_seconds(row.worker) > HEARTBEAT_GONE_SECONDS
            if (too_old or gone) and await self._withdraw(row.id, row.handed_over_at):
                logger.warning(
                    "The hand-over of %s to %s was not claimed; it is made again.",
                    row.id,
                    row.worker,
                    extra={"action": "withdraw", "job_id": row.id},
                )

    async def _withdraw(self, job_id: str, handed_over_at: datetime) -> bool:
        async with self._database.write() as session:
            job = await lock_job(session, job_id)
            if job is None or job.status != JobStatus.QUEUED or job.handed_over_at != handed_over_at:
                return False
            job.worker, job.slots, job.handed_over_at, job.waiting_reason = None, None, None, None
            return True

    async def _hand_over(self, job_id: str, attempt: int, beat: Heartbeat, slots: list[int], *, gpus: int) -> None:
        """Commit the choice, then send it. One that another server made meanwhile is left alone."""
        async with self._database.write() as session:
            if not self._database.is_sqlite:
                await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEDULING_LOCK})
            job = await lock_job(session, job_id)
            if job is None or job.status != JobStatus.QUEUED or job.worker is not None or job.attempt != attempt:
                return
            load = await _load(session)
            if load.slots.get(beat.worker, set()).intersection(slots) or self._is_full(load.jobs[job.project]):
                return
            now = utc_now()
            job.worker, job.slots, job.handed_over_at = beat.worker, list(slots), now
            job.waiting_reason = _reason(Wait(WaitingCode.HANDING_OVER, (("worker", beat.worker),)), now)
            resources = Resources.model_validate({**(job.spec.get("resources") or {}), "gpus": gpus})
            job.resolved_spec = {**job.resolved_spec, "resources": resources.model_dump()}
            message = HandOver(
                job_id=job.id,
                attempt=job.attempt + 1,
                worker=beat.worker,
                slots=slots,
                spec=_spec_of(job),
                resolved_spec=job.resolved_spec,
                processes=resources.num_processes,
                resume_from=await resume_from(session, job),
            )
        try:
            await self._send(message)
        except RedisUnavailable as error:
            logger.warning(
                "%s could not be handed to %s (%s); it stays queued.",
                job_id,
                beat.worker,
                error,
                extra={"action": "hand_over", "job_id": job_id, "attempt": message.attempt},
            )
            await self._withdraw(job_id, now)

    async def _explain(self, waits: list[tuple[Queued, Wait]]) -> None:
        """Write the reasons that changed; ``since`` is when the present one began."""
        groups: dict[Wait, list[str]] = {}
        for row, wait in waits:
            old: dict[str, Any] = row.waiting_reason or {}
            message = wait.message or WAITING_SENTENCES[wait.code]
            if (old.get("code"), old.get("message"), old.get("details")) != (wait.code, message, dict(wait.details)):
                groups.setdefault(wait, []).append(row.id)
        now = utc_now()
        for wait, ids in groups.items():
            for start in range(0, len(ids), UPDATE_CHUNK):
                chunk = JobRow.id.in_(ids[start : start + UPDATE_CHUNK])
                async with self._database.write() as session:  # one short transaction each: others want to write too
                    await session.execute(
                        update(JobRow)
                        .where(chunk, JobRow.status == JobStatus.QUEUED, JobRow.worker.is_(None))
                        .values(waiting_reason=_reason(wait, now))
                    )


_COLUMNS = select(
    JobRow.id,
    JobRow.project,
    JobRow.attempt,
    JobRow.priority,
    JobRow.created_at,
    JobRow.worker,
    JobRow.handed_over_at,
    JobRow.not_before,
    JobRow.waiting_reason,
    JobRow.spec["resources"].label("resources"),
    JobRow.resolved_spec["resources"].label("decided_resources"),
    JobRow.resolved_spec["threads"].label("decided_threads"),
    JobRow.resolved_spec["device_kind"].label("device_kind"),
    JobRow.spec["time_limit_seconds"].label("time_limit"),
    JobRow.spec["resume_from_checkpoint"].label("resumed"),
).where(JobRow.status == JobStatus.QUEUED)
_WAITING = (
    _COLUMNS.where(JobRow.worker.is_(None))
    .order_by(JobRow.priority.desc(), JobRow.created_at, JobRow.id)
    .limit(PAGE_JOBS)
)
_REDIS_AWAY = Wait(WaitingCode.NO_WORKER, message="Redis cannot be reached, so no worker can be; see the log.")


def _behind(row: Queued) -> ColumnElement[bool]:
    """The jobs that come after ``row`` in the queue."""
    return or_(
        JobRow.priority < row.priority,
        and_(JobRow.priority == row.priority, JobRow.created_at > row.created_at),
        and_(JobRow.priority == row.priority, JobRow.created_at == row.created_at, JobRow.id > row.id),
    )


def _resources(row: Queued) -> Resources:
    """As asked; a job that was started once stays on GPUs, or without, because its bits depend on that.

    So does, where exactness is asked for, one that resumes the checkpoint of another.
    """
    asked = Resources.model_validate(row.resources or {})
    if asked.gpus is not None:
        return asked
    if not row.attempt:
        kind = row.device_kind if asked.exact else None
        return asked if kind is None else asked.model_copy(update={"gpus": int(not kind.startswith("cpu:"))})
    return asked.model_copy(update={"gpus": (row.decided_resources or {}).get("gpus")})


def _threads(row: Queued, resources: Resources) -> int:
    """How many cores each process needs at least: a CPU's bits depend on the threads that the job began with.

    One that resumes another job's checkpoint has the threads of that one, and may have begun where there are fewer
    cores: it says so itself (the warning ``threads_changed``), and waits for none.
    """
    if not row.attempt or resources.gpus or row.resumed is not None:
        return 1
    return row.decided_threads if isinstance(row.decided_threads, int) else 1  # none before it is decided


def _closed(beat: Heartbeat, drained: Collection[str]) -> Wait | None:
    """Why a live worker takes no job."""
    if beat.worker in drained:
        return Wait(WaitingCode.NO_WORKER, message="Every worker that could run the job is being drained.")
    return Wait(WaitingCode.DISK, (("worker", beat.worker),)) if beat.disk_low else None


def _free_slots(beat: Heartbeat, taken: set[int]) -> list[int]:
    return [slot.slot for slot in beat.slots if slot.job_id is None and slot.slot not in taken]


async def _load(session: AsyncSession) -> _Load:
    rows = await session.execute(
        select(JobRow.project, JobRow.worker, JobRow.slots).where(
            JobRow.status.in_([JobStatus.QUEUED, JobStatus.RUNNING]), JobRow.worker.is_not(None)
        )
    )
    load = _Load({}, Counter())
    for project, worker, slots in rows:
        load.slots.setdefault(str(worker), set()).update(slots or [])
        load.jobs[project] += 1
    return load


def _spec_of(job: JobRow) -> dict[str, Any]:
    """The spec as it was sent, but for what the first start decided: what ``latest`` meant, and whether it has GPUs.

    ``resources.exact`` is the scheduler's alone, and workers of the version before refuse a field they do not know.
    """
    resources = {name: value for name, value in job.resolved_spec["resources"].items() if name != "exact"}
    spec = {**job.spec, "resources": resources}
    model = job.resolved_spec.get("model")
    return {**spec, "model": model} if isinstance(model, dict) and "job" in model else spec


def _reason(wait: Wait, since: datetime) -> dict[str, Any]:
    return WaitingReason(
        code=wait.code,
        message=wait.message or WAITING_SENTENCES[wait.code],
        since=since,
        details=dict(wait.details),
    ).model_dump(mode="json")
