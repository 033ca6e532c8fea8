"""Watches running jobs: sends stop orders until they are obeyed, and ends the attempts of workers that are lost.

A worker is lost to an attempt when its live process no longer lists it (it was restarted and found nothing, or gave
up), or when it has been silent for ``lease_seconds`` while Redis could be reached. Only a process of the same folder
can know that an attempt is gone: one by the same name elsewhere (another disk, another machine) may have taken the
place of a worker whose training still runs, so then the lease counts. An attempt that a worker still lists although it
is over is told so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from pydantic import BaseModel
from sqlalchemy import select

from server.database.db import Database
from server.database.drains import drained_workers
from server.database.state import lock_job
from server.database.tables import AttemptRow, JobRow
from server.engine.disk import queue_what_waits_for_room
from server.engine.endings import lose_worker
from server.engine.fleet import Fleet
from server.engine.loops import Pass, raise_first, try_each
from server.engine.orders import RUNNING, Orders
from server.engine.stored import Stored
from zeta_core.contract.job import JobStatus
from zeta_core.contract.messages import Heartbeat, JournalAck, StopOrder, place_of

# A worker beats every 2 s and lists an attempt from the moment it got the hand-over: two beats may still be under way.
UNLISTED_SECONDS = 5.0

logger = logging.getLogger(__name__)
Tell = Callable[[str, BaseModel], Awaitable[None]]


class Watch:
    def __init__(
        self, database: Database, fleet: Fleet, tell: Tell, stored: Stored, freed: Callable[[], None], *, lease: float
    ) -> None:
        self._database = database
        self._fleet = fleet
        self._tell = tell
        self._stored = stored
        self._freed = freed
        self._orders = Orders(database)
        self._lease_seconds = lease
        self._unlisted_since: dict[tuple[str, int], float] = {}  # monotonic
        self._strange_since: dict[tuple[str, str, int], float] = {}

    def passes(self) -> dict[str, Pass]:
        """One loop each, by name, so that a fault in one leaves the others alone."""
        return {
            "stop orders": self._send_orders,
            "lost workers": self._find_lost,
            "overruled attempts": self._tell_the_overruled,
            "disk space": self._queue_what_waits_for_room,
        }

    async def _send_orders(self) -> None:
        if not self._fleet.watching:
            return
        running, drained = await self._read()

        async def send(due: tuple[str, StopOrder]) -> None:
            await self._tell(*due)

        raise_first(await try_each(await self._orders.due(running, drained), send))

    async def _queue_what_waits_for_room(self) -> None:
        if not self._fleet.watching:
            return
        _, drained = await self._read()
        if any(self._takes_jobs(beat) and beat.worker not in drained for beat in self._fleet.workers()):
            for job_id in await queue_what_waits_for_room(self._database):
                self._stored.notify(job_id)
                self._freed()

    async def _read(self) -> tuple[Sequence[Any], Collection[str]]:
        async with self._database.read() as session:
            return (await session.execute(RUNNING)).all(), await drained_workers(session)

    def _takes_jobs(self, beat: Heartbeat) -> bool:
        return self._fleet.is_alive(beat.worker) and not beat.stopping and not beat.disk_low

    async def _find_lost(self) -> None:
        if not self._fleet.watching:
            return
        running, _ = await self._read()
        now = time.monotonic()
        unlisted: dict[tuple[str, int], float] = {}

        async def judge(row: Any) -> None:
            key = (row.id, row.attempt)
            why: str | None = None
            place = place_of(row.incarnation)
            silent = self._fleet.silent_seconds(row.worker, place)
            if silent > self._lease_seconds:
                why = f"The worker {row.worker} has not been heard for {silent:.0f} s."
            elif self._knows(row.worker, place) and not self._lists(row.worker, key):
                unlisted[key] = self._unlisted_since.get(key, now)
                if now - unlisted[key] > UNLISTED_SECONDS:
                    why = f"The worker {row.worker} no longer has the training."
            if why is not None:
                await self._lose(row.id, row.attempt, why)

        failure = await try_each(running, judge)
        self._unlisted_since = unlisted
        raise_first(failure)

    def _knows(self, worker: str, place: str | None) -> bool:
        """Whether the worker lives, in this folder: what it does not list is not there."""
        beat = self._fleet.get(worker) if self._fleet.is_alive(worker) else None
        return beat is not None and (place is None or place_of(beat.incarnation) in (place, None))

    def _lists(self, worker: str, key: tuple[str, int]) -> bool:
        beat = self._fleet.get(worker)
        return beat is not None and any((slot.job_id, slot.attempt) == key for slot in beat.slots)

    async def _lose(self, job_id: str, attempt: int, why: str) -> None:
        async with self._database.write() as session:
            job = await lock_job(session, job_id)
            if job is None or job.status != JobStatus.RUNNING or job.attempt != attempt:
                return
            await lose_worker(session, job, attempt=attempt, why=why)
        logger.warning(
            "Attempt %d of %s is lost. %s",
            attempt,
            job_id,
            why,
            extra={"action": "worker_lost", "job_id": job_id, "attempt": attempt},
        )
        self._stored.notify(job_id)
        self._freed()

    async def _tell_the_overruled(self) -> None:
        """A worker that goes on with an attempt which is over (it was cut off, and lost) is told to end it."""
        if not self._fleet.watching:
            return
        listed = {
            (beat.worker, slot.job_id, slot.attempt)
            for beat in self._fleet.workers()
            if self._fleet.is_alive(beat.worker)
            for slot in beat.slots
            if slot.job_id is not None and slot.attempt is not None
        }
        if not listed:
            self._strange_since = {}
            return
        ids = {job_id for _, job_id, _ in listed}
        async with self._database.read() as session:
            jobs = {job.id: job for job in (await session.execute(_STATES.where(JobRow.id.in_(ids)))).all()}
            lines: dict[tuple[str, int], int] = {
                (job_id, attempt): line
                for job_id, attempt, line in await session.execute(_LINES.where(AttemptRow.job_id.in_(ids)))
            }
        now = time.monotonic()
        strange: dict[tuple[str, str, int], float] = {}
        for key in listed:
            worker, job_id, attempt = key
            job = jobs.get(job_id)
            current = (
                job is not None
                and job.worker == worker
                and (
                    (job.status == JobStatus.RUNNING and job.attempt == attempt)
                    or (job.status == JobStatus.QUEUED and job.attempt + 1 == attempt)
                )
            )
            if current:
                continue
            strange[key] = self._strange_since.get(key, now)
            if now - strange[key] > UNLISTED_SECONDS:
                stored_line = lines.get((job_id, attempt), 0)
                ack = JournalAck(job_id=job_id, attempt=attempt, stored_line=stored_line, fenced=True)
                await self._tell(worker, ack)
        self._strange_since = strange


_STATES = select(JobRow.id, JobRow.status, JobRow.attempt, JobRow.worker)
_LINES = select(AttemptRow.job_id, AttemptRow.attempt, AttemptRow.stored_line)
