"""Dispatches queued jobs to workers and records why the remaining jobs wait.

A dispatch is committed before its message is sent, so no message refers to an uncommitted dispatch. A dispatch that
isn't claimed in time, or whose worker is gone, is withdrawn and repeated. A worker's free slots are the free slots in
its heartbeat, minus the slots of jobs that were already dispatched to it.

A new job gets its waiting reason with its insert (`Scheduler.explain`). A pass that can't place any job reads the queue
only if the reasons may have changed, so submissions to a busy service don't cause work for each waiting job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, literal_column, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database
from server.database.draining import drained_workers
from server.database.projects import hub_access
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import lock_job
from server.engine.candidate import Candidate, Placement, Wait
from server.engine.dispatches import record_dispatch, waiting_reason
from server.engine.endings import MAX_BACKOFF_SECONDS, give_up_start
from server.engine.known_workers import KnownWorkers
from server.engine.load import Load, read_load
from server.engine.loops import raise_first, try_each
from server.engine.placement import choose, reserve
from server.engine.requirements import Requirements, requirements, requirements_of
from zeta_core.contract.access import NO_LIMITS, ProjectLimits
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.kind import BACKGROUND_KINDS
from zeta_core.contract.job.status import WAITING_SENTENCES, JobStatus, WaitingCode
from zeta_core.contract.wire.messages import HEARTBEAT_GONE_SECONDS, Dispatch, Heartbeat
from zeta_core.system.redis_access import RedisUnavailable

SCHEDULING_LOCK = 0x7A657461  # "zeta", the key of PostgreSQL's advisory lock
UPDATE_CHUNK = 100
PAGE_JOBS = 200
EXPLAIN_SECONDS = 15.0
# Reasons that change without a notice to this process: the end of a back-off, changes by other servers.
REFRESH_SECONDS = 60.0

logger = logging.getLogger(__name__)
Queued = Any  # a row of `_COLUMNS`
Send = Callable[[Dispatch], Awaitable[None]]


class Scheduler:
    """``default_limits`` are those of a project for which none were set."""

    def __init__(
        self,
        database: Database,
        workers: KnownWorkers,
        send: Send,
        *,
        claim_seconds: float,
        default_limits: ProjectLimits = NO_LIMITS,
    ) -> None:
        self._default_limits = default_limits
        self._database = database
        self._workers = workers
        self._send = send
        self._claim_seconds = claim_seconds
        self._dispatched: dict[tuple[str, datetime], float] = {}  # when this process first saw it (monotonic)
        self._candidates: list[Candidate] = []  # of the last pass
        self._situation: object = None  # what the waiting reasons depended on in the last pass
        self._is_queue_changed = True
        self._is_explained = False  # whether all waiting reasons are those of the current situation
        self._explained_at = float("-inf")  # monotonic

    def queue_changed(self) -> None:
        """Let the next pass read the queue, because a job was queued without a waiting reason, or changed."""
        self._is_queue_changed = True

    def explain(self, job: JobRow) -> dict[str, Any] | None:
        """The waiting reason of a job that is being queued; ``None`` if the next pass will probably place it."""
        if not self._workers.is_connected:
            return waiting_reason(
                _REDIS_UNREACHABLE if self._workers.was_read else Wait(WaitingCode.NO_WORKER), utc_now()
            )
        candidates = [beat for beat in self._candidates if self._workers.is_alive(beat.heartbeat.worker)]
        if not candidates and any(self._workers.is_alive(beat.worker) for beat in self._workers.workers()):
            return None  # a pass will consider these workers
        choice = choose(candidates, requirements_of(job))
        return waiting_reason(choice, utc_now()) if isinstance(choice, Wait) else None

    async def one_pass(self) -> None:
        """Withdraw unclaimed dispatches, then schedule the queue in order.

        The queue is read page by page. Once no slot is free, later pages only need their waiting reasons updated, which
        happens at most every `EXPLAIN_SECONDS`.
        """
        if not self._workers.was_read:
            return  # no heartbeats have been read yet
        async with self._database.read() as session:
            dispatched: Sequence[Queued] = (await session.execute(_COLUMNS.where(JobRow.worker.is_not(None)))).all()
            load = await read_load(session, self._default_limits)
            drained = await drained_workers(session)
        await self._withdraw_unclaimed(dispatched)
        candidates = [
            _candidate(beat, load.slots.get(beat.worker, set()), drained)
            for beat in self._workers.workers()
            if self._workers.is_alive(beat.worker) and not beat.stopping
        ]
        self._candidates = candidates
        workers = [_situation_of(candidate) for candidate in candidates]
        situation = (self._workers.is_connected, workers, load.own_limits)
        is_changed = self._is_queue_changed or situation != self._situation
        self._is_queue_changed, self._situation = False, situation
        self._is_explained = self._is_explained and not is_changed
        age = time.monotonic() - self._explained_at
        explain_all = age >= (REFRESH_SECONDS if self._is_explained else EXPLAIN_SECONDS)
        if any(candidate.free_background for candidate in candidates):
            await self._schedule_background_jobs(candidates, load)
        if is_changed or explain_all or _has_free_slot(candidates):
            await self._schedule_queue(candidates, load, explain_all=explain_all)
        if explain_all:
            self._is_explained, self._explained_at = True, time.monotonic()

    async def _schedule_background_jobs(self, candidates: list[Candidate], load: Load) -> None:
        """Dispatch the first waiting background jobs; `_schedule_queue` stops when all other slots are taken."""
        async with self._database.read() as session:
            page: Sequence[Queued] = (await session.execute(_BACKGROUND.limit(PAGE_JOBS))).all()
        if page:
            raise_first(await self._schedule_page(page, candidates, load))

    async def _schedule_queue(self, candidates: list[Candidate], load: Load, *, explain_all: bool) -> None:
        last: Queued | None = None
        failures: list[Exception | None] = []
        while True:
            async with self._database.read() as session:
                page = await _next_page(session, last)
            failures.append(await self._schedule_page(page, candidates, load))
            if len(page) < PAGE_JOBS or not (explain_all or _has_free_slot(candidates)):
                break
            last = page[-1]
        raise_first(*failures)

    async def _schedule_page(self, page: Sequence[Queued], candidates: list[Candidate], load: Load) -> Exception | None:
        """Dispatch the jobs that fit and update the waiting reasons of the others on the page.

        A failing row doesn't affect the others; the first failure is returned.
        """
        waits: list[tuple[Queued, Wait]] = []
        known_waits: dict[Requirements, Wait] = {}  # until a slot is taken
        now = utc_now()

        async def consider(row: Queued) -> None:
            if not self._workers.is_connected:
                waits.append((row, _REDIS_UNREACHABLE))
                return
            # A time beyond the longest back-off means that the clock was set back; ignore it.
            if row.not_before is not None and 0 < (row.not_before - now).total_seconds() <= MAX_BACKOFF_SECONDS:
                waits.append((row, _backoff_wait(row)))
                return
            if (ending := load.ending_wait(row.id)) is not None:
                waits.append((row, ending))
                return
            needs = _requirements(row)
            choice = known_waits.get(needs) or choose(candidates, needs)
            if isinstance(choice, Wait):
                known_waits[needs] = choice
                waits.append((row, choice))
                gpus = needs.resources.gpus if isinstance(needs.resources.gpus, int) else 1
                if load.quota_wait(row.project, gpus * min(needs.node_counts)) is None and reserve(candidates, needs):
                    known_waits.clear()
                return
            quota_wait = load.quota_wait(row.project, choice.total_gpus)
            if quota_wait is not None:
                waits.append((row, quota_wait))
                return
            load.add(row.project, choice.total_gpus)
            known_waits.clear()
            choice.take()
            await self._dispatch(row.id, row.attempt, choice)

        failure = await try_each(page, consider)
        await self._explain(waits)
        return failure

    async def _withdraw_unclaimed(self, dispatched: Sequence[Queued]) -> None:
        """Withdraw dispatches that were not claimed in time; a later pass dispatches the jobs again."""
        now = time.monotonic()
        rows = {(row.id, row.dispatched_at): row for row in dispatched}
        self._dispatched = {key: self._dispatched.get(key, now) for key in rows}
        for key, row in rows.items():
            too_old = now - self._dispatched[key] > self._claim_seconds
            gone = self._workers.silent_seconds(row.worker) > HEARTBEAT_GONE_SECONDS
            if (too_old or gone) and await self._withdraw(row.id, row.dispatched_at):
                logger.warning(
                    "Worker %s did not claim %s in time; dispatching it again.",
                    row.worker,
                    row.id,
                    extra={"action": "withdraw", "job_id": row.id},
                )

    async def _withdraw(self, job_id: str, dispatched_at: datetime) -> bool:
        async with self._database.write() as session:
            job = await lock_job(session, job_id)
            if job is None or job.status != JobStatus.QUEUED or job.dispatched_at != dispatched_at:
                return False
            job.worker, job.slots, job.dispatched_at, job.waiting_reason = None, None, None, None
            return True

    async def _dispatch(self, job_id: str, attempt: int, placement: Placement) -> None:
        """Commit the dispatch, then send it. Do nothing if another server has dispatched the job already."""
        async with self._database.write() as session:
            if not self._database.is_sqlite:
                await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEDULING_LOCK})
            job = await lock_job(session, job_id)
            if job is None or job.status != JobStatus.QUEUED or job.worker is not None or job.attempt != attempt:
                return
            load = await read_load(session, self._default_limits)
            is_taken = any(
                load.slots.get(node.candidate.heartbeat.worker, set()).intersection(node.slots)
                for node in placement.nodes
            )
            if is_taken or load.ending_wait(job_id) or load.quota_wait(job.project, placement.total_gpus):
                return
            hub = await hub_access(session, job.project, self._default_limits)
            messages = await record_dispatch(session, job, placement, hub)
            dispatched_at = job.dispatched_at
            assert dispatched_at is not None, f"{job_id} was just dispatched"
        for message in messages:
            try:
                await self._send(message)
            except RedisUnavailable as error:
                logger.warning(
                    "Could not send %s to worker %s (%s); the attempt is repeated.",
                    job_id,
                    message.worker,
                    error,
                    extra={"action": "dispatch", "job_id": job_id, "attempt": message.attempt},
                )
                if message.num_nodes == 1:
                    await self._withdraw(job_id, dispatched_at)
                else:
                    await self._give_up_start(message)
                return

    async def _give_up_start(self, unsent: Dispatch) -> None:
        """Immediately end an attempt on several workers if one of them can't be notified, and so won't claim it."""
        async with self._database.write() as session:
            job = await lock_job(session, unsent.job_id)
            attempt = await session.get(AttemptRow, (unsent.job_id, unsent.attempt))
            is_current = job is not None and job.status == JobStatus.RUNNING and job.attempt == unsent.attempt
            if job is not None and is_current and attempt is not None and attempt.is_preparing:
                message = f"Worker {unsent.worker} (node {unsent.node_rank}) could not be reached through Redis."
                await give_up_start(session, job, message=message)

    async def _explain(self, waits: list[tuple[Queued, Wait]]) -> None:
        """Store the waiting reasons that changed; ``since`` is when the current reason began."""
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
                async with self._database.write() as session:  # short, so that other writers don't wait long
                    await session.execute(
                        update(JobRow)
                        .where(chunk, JobRow.status == JobStatus.QUEUED, JobRow.worker.is_(None))
                        .values(waiting_reason=waiting_reason(wait, now))
                    )


_COLUMNS = select(
    JobRow.id,
    JobRow.kind,
    JobRow.project,
    JobRow.attempt,
    JobRow.priority,
    JobRow.created_at,
    JobRow.worker,
    JobRow.dispatched_at,
    JobRow.not_before,
    JobRow.waiting_reason,
    JobRow.spec["resources"].label("resources"),
    JobRow.resolved_spec_json["resources"].label("resolved_resources"),
    JobRow.resolved_spec_json["threads"].label("resolved_threads"),
    JobRow.resolved_spec_json["device_kind"].label("device_kind"),
    JobRow.spec["time_limit_seconds"].label("time_limit"),
    JobRow.spec["resume_from_checkpoint"].label("resumed"),
    JobRow.spec["elastic"].label("elastic"),
    JobRow.resolved_spec_json["global_batch_size"].label("global_batch_size"),
).where(JobRow.status == JobStatus.QUEUED)
_WAITING = _COLUMNS.where(JobRow.worker.is_(None)).order_by(JobRow.created_at, JobRow.id)
# Written as in the condition of the index of the other kinds, which has few entries.
_IS_OTHER_KIND = JobRow.kind != literal_column("'training'")
_BACKGROUND = _COLUMNS.where(
    _IS_OTHER_KIND, JobRow.kind.in_(sorted(BACKGROUND_KINDS)), JobRow.worker.is_(None)
).order_by(JobRow.priority.desc(), JobRow.created_at, JobRow.id)
_REDIS_UNREACHABLE = Wait(
    WaitingCode.NO_WORKER, message="Redis is unreachable, so workers can't be reached; see the server log."
)


async def _next_page(session: AsyncSession, last: Queued | None) -> Sequence[Queued]:
    """The next `PAGE_JOBS` waiting jobs after ``last``, in the order of the queue.

    One query for each priority, because an index contains the order within a priority only.
    """
    page: list[Queued] = []
    priority = None if last is None else last.priority
    if last is not None:
        later = tuple_(JobRow.created_at, JobRow.id) > (last.created_at, last.id)
        page += await _of_priority(session, last.priority, PAGE_JOBS, later)
    while len(page) < PAGE_JOBS:
        highest = select(func.max(JobRow.priority)).where(JobRow.status == JobStatus.QUEUED)
        priority = await session.scalar(highest if priority is None else highest.where(JobRow.priority < priority))
        if priority is None:
            break
        page += await _of_priority(session, priority, PAGE_JOBS - len(page))
    return page


async def _of_priority(
    session: AsyncSession, priority: int, limit: int, *conditions: ColumnElement[bool]
) -> Sequence[Queued]:
    query = _WAITING.where(JobRow.priority == priority, *conditions).limit(limit)
    return (await session.execute(query)).all()


def _backoff_wait(row: Queued) -> Wait:
    """The wait of a job after a failure; a reason that was stored with the end of the attempt is kept."""
    stored: dict[str, Any] = row.waiting_reason or {}
    message = stored.get("message") if stored.get("code") == WaitingCode.RETRY_BACKOFF else None
    return Wait(WaitingCode.RETRY_BACKOFF, (("until", row.not_before.isoformat()),), message)


def _has_free_slot(candidates: Sequence[Candidate]) -> bool:
    return any(candidate.free and candidate.unavailable is None for candidate in candidates)


def _situation_of(candidate: Candidate) -> object:
    """Everything about a worker that waiting reasons depend on."""
    beat = candidate.heartbeat
    machine = beat.contract_version, beat.cores, beat.cpu_kind, beat.labels, beat.all_slots
    return beat.worker, *machine, candidate.free, candidate.free_background, candidate.unavailable


def _requirements(row: Queued) -> Requirements:
    return requirements(
        kind=row.kind,
        attempt=row.attempt,
        resources=row.resources,
        resolved_resources=row.resolved_resources,
        resolved_threads=row.resolved_threads,
        device_kind=row.device_kind,
        time_limit=row.time_limit,
        resumed=row.resumed,
        elastic=row.elastic,
        global_batch_size=row.global_batch_size,
    )


def _unavailable(beat: Heartbeat, drained: Collection[str]) -> Wait | None:
    """The reason why a live worker accepts no jobs, if any."""
    if beat.worker in drained:
        return Wait(WaitingCode.NO_WORKER, message="All workers that could run the job are being drained.")
    return Wait(WaitingCode.DISK, (("worker", beat.worker),)) if beat.disk_low else None


def _candidate(beat: Heartbeat, taken: set[int], drained: Collection[str]) -> Candidate:
    """The worker with its free slots; jobs were dispatched to the slots ``taken``."""
    background = [slot.slot for slot in beat.background_slots if slot.job_id is None and slot.slot not in taken]
    return Candidate(beat, _free_slots(beat, taken), _unavailable(beat, drained), background)


def _free_slots(beat: Heartbeat, taken: set[int]) -> list[int]:
    """The slots without a job; those whose served models would be ended come last."""
    free = [slot for slot in beat.slots if slot.job_id is None and slot.slot not in taken]
    return [slot.slot for slot in sorted(free, key=lambda slot: len(slot.served))]
