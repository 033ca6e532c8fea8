"""Dispatches queued jobs to workers and records why the remaining jobs wait.

A dispatch is committed before its message is sent, so no message refers to an uncommitted dispatch. Jobs that each need
a single worker are dispatched in groups, one transaction for each group. A dispatch that isn't claimed in time, or
whose worker is gone, is withdrawn and repeated. A worker's free slots are the free slots in its heartbeat, minus the
slots of jobs that were already dispatched to it.

`scheduling.plan` decides which job starts where. A new job gets its waiting reason with its insert
(`Scheduler.explain`). A pass that can't place any job reads the queue only if the reasons may have changed, so
submissions to a busy service don't cause work for each waiting job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import text

from server.database.checkpoints import newest_resumable_of
from server.database.connections import Database
from server.database.draining import drained_workers
from server.database.recent_use import SAMPLE_SECONDS, RecentUse, recent_use, store_recent_use
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import lock_job, lock_jobs
from server.engine.candidate import Candidate, Placement, Wait
from server.engine.dispatches import record_dispatch, waiting_reason
from server.engine.endings import give_up_start
from server.engine.known_workers import KnownWorkers
from server.engine.load import Load, read_load, read_load_for_dispatch
from server.engine.loops import EXPECTED_ERRORS, raise_first, try_each
from server.engine.placement import choose
from server.engine.requirements import requirements_of
from server.engine.scheduling.fair_share import NEGLIGIBLE_SLOTS, updated_mean
from server.engine.scheduling.live_workers import has_free_slot, has_usable_slot, live_workers, situation_of
from server.engine.scheduling.plan import FleetState, Planner, WaitingJob
from server.engine.scheduling.queue_pages import (
    QueuedRow,
    QueuePages,
    dispatched_jobs,
    first_background_jobs,
    queue_version,
)
from server.engine.scheduling.start_times import estimated_starts
from server.engine.scheduling.stored_reasons import store_reasons
from server.engine.scheduling.turn import Turn, scheduling_turn
from server.engine.scheduling.waiting_jobs import REDIS_UNREACHABLE, backoff_seconds, waiting_job
from zeta_core.contract.access import NO_LIMITS, ProjectLimits
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus, WaitingCode
from zeta_core.contract.wire.messages import HEARTBEAT_GONE_SECONDS, Dispatch
from zeta_core.system.outage import error_text
from zeta_core.system.redis_access import RedisUnavailable

DISPATCH_LOCK = 0x7A657461  # "zeta", the key of PostgreSQL's advisory lock
HALF_LIFE_SECONDS = 86_400.0  # of the mean use in the fair share, by default
GROUP_SIZE = 50  # jobs that are dispatched in one transaction, which other writers of SQLite wait for
FIRST_PAGE_SECONDS = 5.0  # the first page is read at least this often, because the remaining times of jobs change
ESTIMATE_SECONDS = 5.0  # between two estimates of when the jobs of the first page start
ALL_PAGES_SECONDS = 5.0  # between two passes that read all pages and place no job
# Between two passes that update the waiting reasons of all jobs: while reasons may have changed, and otherwise, because
# other servers change limits and drain workers without notifying this process.
EXPLAIN_SECONDS, REFRESH_SECONDS = 15.0, 60.0

logger = logging.getLogger(__name__)
Send = Callable[[Dispatch], Awaitable[None]]
_Placed = tuple[WaitingJob, Placement]


@dataclass(frozen=True)
class _Dispatched:
    """A committed dispatch: its messages, one for each node, and its time."""

    messages: Sequence[Dispatch]
    at: datetime


@dataclass(frozen=True)
class _PageResult:
    """``failure`` is the first one of a row of the page."""

    num_placed: int
    failure: Exception | None


class Scheduler:
    """Schedules the queue, one pass at a time.

    ``default_limits`` are those of a project for which none were set. The mean use of a project, for the fair share,
    halves in ``half_life_seconds`` without jobs.
    """

    def __init__(
        self,
        database: Database,
        workers: KnownWorkers,
        send: Send,
        *,
        claim_seconds: float,
        default_limits: ProjectLimits = NO_LIMITS,
        half_life_seconds: float = HALF_LIFE_SECONDS,
    ) -> None:
        self._half_life_seconds = half_life_seconds
        self._default_limits = default_limits
        self._database = database
        self._workers = workers
        self._send = send
        self._claim_seconds = claim_seconds
        self._dispatched: dict[tuple[str, datetime], float] = {}  # when this process first saw it (monotonic)
        self._candidates: list[Candidate] = []  # of the last pass
        self._situation: object = None  # what the waiting reasons depended on in the last pass
        self._queue_version: object = None
        self._is_queue_changed = True
        self._first_page_due_at = self._all_pages_due_at = float("-inf")  # monotonic: when to read these pages
        self._estimate_due_at = float("-inf")  # monotonic: when to estimate the starts of the first jobs
        self._is_explained = False  # whether all waiting reasons are those of the current situation
        self._explained_at = float("-inf")  # monotonic

    def queue_changed(self) -> None:
        """Let the next pass read the queue, because a job was queued without a waiting reason, or changed."""
        self._is_queue_changed = True

    def explain(self, job: JobRow) -> dict[str, Any] | None:
        """The waiting reason of a job that is being queued; ``None`` if the next pass will probably place it."""
        if not self._workers.is_connected:
            return waiting_reason(
                REDIS_UNREACHABLE if self._workers.was_read else Wait(WaitingCode.NO_WORKER), utc_now()
            )
        candidates = [each for each in self._candidates if self._workers.is_alive(each.heartbeat.worker)]
        if not candidates and any(self._workers.is_alive(beat.worker) for beat in self._workers.workers()):
            return None  # a pass will consider these workers
        choice = choose(candidates, requirements_of(job))
        return waiting_reason(choice, utc_now()) if isinstance(choice, Wait) else None

    async def one_pass(self) -> None:
        """Withdraw unclaimed dispatches, then schedule the queue, while no other server does."""
        if self._workers.was_read:  # otherwise, no heartbeats have been read yet
            async with scheduling_turn(self._database) as turn:
                if turn is not None:
                    await self._take_turn(turn)

    async def _take_turn(self, turn: Turn) -> None:
        async with self._database.read() as session:
            dispatched = await dispatched_jobs(session)
            load = await read_load(session, self._default_limits)
            drained = await drained_workers(session)
            use = await recent_use(session)
            version = await queue_version(session)
        await self._withdraw_unclaimed(dispatched)
        beats = [beat for beat in self._workers.workers() if self._workers.is_alive(beat.worker)]
        workers = live_workers(beats, load, drained)
        planner = Planner(FleetState(workers, load, await self._sample_use(load, use)))
        situation = (self._workers.is_connected, [situation_of(worker) for worker in workers], load.key)
        is_changed = self._is_queue_changed or situation != self._situation
        has_new_jobs = version != self._queue_version
        self._is_queue_changed, self._situation, self._queue_version = False, situation, version
        self._is_explained = self._is_explained and not is_changed
        now = time.monotonic()
        explain_all = now - self._explained_at >= (REFRESH_SECONDS if self._is_explained else EXPLAIN_SECONDS)
        failures: list[Exception | None] = []
        try:
            if is_changed or has_new_jobs or now >= self._first_page_due_at:
                failures.append(await self._schedule_background_jobs(planner, load))
            if is_changed or (has_new_jobs and has_free_slot(workers)) or explain_all or now >= self._first_page_due_at:
                self._first_page_due_at = now + FIRST_PAGE_SECONDS
                self._candidates = planner.candidates
                failures.append(await self._schedule_queue(planner, load, turn, explain_all=explain_all))
        except BaseException:
            self._is_queue_changed = True  # an outage: the next pass reads the queue again
            raise
        raise_first(*failures)
        if explain_all:
            self._is_explained, self._explained_at = True, time.monotonic()

    async def _sample_use(self, load: Load, use: Mapping[str, RecentUse]) -> Mapping[str, float]:
        """The mean numbers of slots that projects held recently, with a new sample if one is due."""
        now, held = utc_now(), {project: num_slots for project, num_slots in load.held_slots.items() if num_slots}
        last = max((mean.updated_at for mean in use.values()), default=None)
        elapsed = SAMPLE_SECONDS if last is None else (now - last).total_seconds()
        if 0 <= elapsed < SAMPLE_SECONDS or not (use or held):
            return {project: mean.mean_slots for project, mean in use.items()}
        means = {
            project: updated_mean(
                use[project].mean_slots if project in use else 0.0,
                held.get(project, 0),
                elapsed_seconds=elapsed,
                half_life_seconds=self._half_life_seconds,
            )
            for project in {*use, *held}
        }
        means = {project: mean for project, mean in means.items() if mean >= NEGLIGIBLE_SLOTS or project in held}
        async with self._database.write() as session:
            await store_recent_use(session, means, now)
        return means

    async def _schedule_background_jobs(self, planner: Planner, load: Load) -> Exception | None:
        """Dispatch the first waiting background jobs; returns the first failure.

        `_schedule_queue` reads no further page when all other slots are taken.
        """
        if not any(candidate.free_background for candidate in planner.candidates):
            return None
        async with self._database.read() as session:
            page = await first_background_jobs(session)
        return (await self._schedule_page(page, planner, load)).failure if page else None

    async def _schedule_queue(self, planner: Planner, load: Load, turn: Turn, *, explain_all: bool) -> Exception | None:
        """Place the jobs that fit, page by page.

        Once no slot is left, later pages only need their waiting reasons updated, which happens at most every
        `EXPLAIN_SECONDS`. If the jobs of the first page leave slots that they can't use, all pages are read, at most
        every `ALL_PAGES_SECONDS` if that places no job. Returns the first failure.
        """
        pages = QueuePages(planner.share)
        async with self._database.read() as session:
            first_page = await pages.next_page(session)
        is_estimate_due = time.monotonic() >= self._estimate_due_at
        if is_estimate_due:
            self._estimate_due_at = time.monotonic() + ESTIMATE_SECONDS
        first = await self._schedule_page(first_page, planner, load, estimate=is_estimate_due)
        later: list[_PageResult] = []
        is_all_pages_due = time.monotonic() >= self._all_pages_due_at
        while not pages.is_complete and (explain_all or (is_all_pages_due and has_usable_slot(planner.candidates))):
            await turn.keep()
            async with self._database.read() as session:
                page = await pages.next_page(session)
            later.append(await self._schedule_page(page, planner, load))
        if later and not any(result.num_placed for result in later):
            self._all_pages_due_at = time.monotonic() + ALL_PAGES_SECONDS
        return next((result.failure for result in (first, *later) if result.failure is not None), None)

    async def _schedule_page(
        self, page: Sequence[QueuedRow], planner: Planner, load: Load, *, estimate: bool = False
    ) -> _PageResult:
        """Dispatch the jobs that fit, and update the waiting reasons of the others on the page.

        Without ``estimate``, the estimated starts stay as they are. A failing row doesn't affect the others.
        """
        now, rows, jobs = utc_now(), {row.id: row for row in page}, list[WaitingJob]()

        async def read(row: QueuedRow) -> None:
            jobs.append(waiting_job(row, load, now, is_connected=self._workers.is_connected))
            if (seconds := backoff_seconds(row, now)) is not None:
                self._first_page_due_at = min(self._first_page_due_at, time.monotonic() + seconds)

        failures = [await try_each(page, read)]
        plan = planner.plan(jobs)
        failures.append(await self._dispatch_all(plan.placements))
        starts = estimated_starts(plan, planner) if estimate else None
        await store_reasons(self._database, [(rows[job.id], wait) for job, wait in plan.waits], starts)
        failure = next((failure for failure in failures if failure is not None), None)
        return _PageResult(len(plan.placements), failure)

    async def _withdraw_unclaimed(self, dispatched: Sequence[QueuedRow]) -> None:
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

    async def _dispatch_all(self, placements: Sequence[_Placed]) -> Exception | None:
        """Dispatch these jobs, in groups if each needs a single worker; returns the first failure.

        If a group fails, each of its jobs is dispatched on its own, so a failing job doesn't affect the others.
        """
        on_single_workers = [placed for placed in placements if len(placed[1].nodes) == 1]
        on_several = [placed for placed in placements if len(placed[1].nodes) > 1]
        retried: list[_Placed] = []
        failures: list[Exception | None] = []
        for start in range(0, len(on_single_workers), GROUP_SIZE):
            group = on_single_workers[start : start + GROUP_SIZE]
            try:
                dispatched = await self._record(group)
            except EXPECTED_ERRORS:
                raise
            except Exception as error:  # noqa: BLE001 - it is raised again for the job that fails
                logger.warning("%d jobs are dispatched one by one, because: %s", len(group), error_text(error))
                retried.extend(group)
            else:
                failures.append(await try_each(dispatched, self._deliver))
        failures.append(await try_each([*on_several, *retried], self._dispatch))
        return next((failure for failure in failures if failure is not None), None)

    async def _dispatch(self, placed: _Placed) -> None:
        for dispatched in await self._record([placed]):
            await self._deliver(dispatched)

    async def _record(self, placements: Sequence[_Placed]) -> Sequence[_Dispatched]:
        """Commit the dispatch of these jobs in one transaction.

        Jobs that have changed, or that another server has dispatched, are left out, and so are those whose slots are
        taken meanwhile.
        """
        ids = [waiting.id for waiting, _ in placements]
        workers = {node.candidate.heartbeat.worker for _, placement in placements for node in placement.nodes}
        recorded: list[_Dispatched] = []
        async with self._database.write() as session:
            if not self._database.is_sqlite:
                await session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": DISPATCH_LOCK})
            jobs = await lock_jobs(session, ids)
            if len(jobs) < len(ids):
                self._is_queue_changed = True  # another transaction has locked a job; the next pass reads it again
            projects = {waiting.project for waiting, _ in placements}
            load = await read_load_for_dispatch(session, self._default_limits, projects, workers)
            checkpoints = await newest_resumable_of(session, ids)
            for waiting, placement in placements:
                job = jobs.get(waiting.id)
                if job is None or job.attempt != waiting.attempt or not _may_start(job, placement, load):
                    continue
                hub, newest = load.limits(job.project).hub_access, checkpoints.get(job.id)
                messages = await record_dispatch(session, job, placement, hub, waiting.inputs, newest_checkpoint=newest)
                assert job.dispatched_at is not None, f"{job.id} was just dispatched"
                recorded.append(_Dispatched(messages, job.dispatched_at))
                for node in placement.nodes:
                    load.slots.setdefault(node.candidate.heartbeat.worker, set()).update(node.slots)
                load.add(job.project, placement.total_gpus, 0)
        return recorded

    async def _deliver(self, dispatched: _Dispatched) -> None:
        """Send the messages of a committed dispatch; if Redis doesn't accept one, take the dispatch back."""
        for message in dispatched.messages:
            try:
                await self._send(message)
            except RedisUnavailable as error:
                logger.warning(
                    "Could not send %s to worker %s (%s); the attempt is repeated.",
                    message.job_id,
                    message.worker,
                    error,
                    extra={"action": "dispatch", "job_id": message.job_id, "attempt": message.attempt},
                )
                if message.num_nodes == 1:
                    await self._withdraw(message.job_id, dispatched.at)
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


def _may_start(job: JobRow, placement: Placement, load: Load) -> bool:
    """Whether the job still waits, its slots are still free, and its project's limits still allow it to start."""
    is_waiting = job.status == JobStatus.QUEUED and job.worker is None
    is_taken = any(
        load.slots.get(node.candidate.heartbeat.worker, set()).intersection(node.slots) for node in placement.nodes
    )
    must_wait = load.ending_wait(job.id) or load.quota_wait(job.project, placement.total_gpus)
    return is_waiting and not is_taken and not must_wait
