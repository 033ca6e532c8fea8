"""Determines which running jobs must stop: on a user's request, at the time limit, or on a drained worker.

A stop request is due in every pass until its attempt has ended, so a lost one is repeated. Running time is measured
with this process's monotonic clock, starting from the time in the database; see `database.time_limits`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, select, update

from server.database import time_limits
from server.database.connections import Database
from server.database.tables import AttemptRow, JobRow
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus, StopAction
from zeta_core.contract.wire.messages import StopRequest

RECORD_SECONDS = 10.0  # the interval of recording running times; a killed server loses at most this much
Running = Any  # a row of `RUNNING`
Nodes = Mapping[tuple[str, int], Sequence[str]]  # the workers of each attempt on several workers, by job and number

logger = logging.getLogger(__name__)

RUNNING = (
    select(
        JobRow.id,
        JobRow.attempt,
        JobRow.requested_action,
        JobRow.num_save_requests,
        JobRow.fulfilled_save_request,
        JobRow.spec["time_limit_seconds"].label("time_limit_seconds"),
        AttemptRow.worker,
        AttemptRow.incarnation,
        AttemptRow.started_at,
        AttemptRow.ran_seconds,
        AttemptRow.num_nodes,
    )
    .join(AttemptRow, and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == JobRow.attempt))
    .where(JobRow.status == JobStatus.RUNNING, AttemptRow.is_preparing.is_(False))
)


@dataclass
class _Timer:
    """Measures an attempt of a job with a time limit; it ran for ``seconds_before`` until this process first saw it."""

    earlier_seconds: float  # of the job's earlier attempts
    seconds_before: float
    seen_at: float  # monotonic
    recorded_at: float = -RECORD_SECONDS  # monotonic; the first pass records


class StopRequests:
    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._timers: dict[tuple[str, int], _Timer] = {}

    async def due(
        self, running: Sequence[Running], nodes: Nodes, drained: Collection[str]
    ) -> list[tuple[str, StopRequest]]:
        """All stop requests to send now, with their workers; a user's request takes precedence.

        All nodes of an attempt get the same request.
        """
        out_of_time = await self._out_of_time(running)
        requests: list[tuple[str, StopRequest]] = []
        for row in running:
            key = (row.id, row.attempt)
            workers = nodes.get(key, (row.worker,))
            action: StopAction
            if row.requested_action is not None:
                action = "cancel" if row.requested_action == "cancel" else "pause"
            elif key in out_of_time:
                action = "time_limit"
            elif any(worker in drained for worker in workers):
                action = "hand_back"
            else:
                continue
            request = StopRequest(job_id=row.id, attempt=row.attempt, action=action)
            requests += [(worker, request) for worker in workers]
        return requests

    async def _out_of_time(self, running: Sequence[Running]) -> set[tuple[str, int]]:
        """The attempts whose jobs have reached their ``time_limit_seconds``."""
        now = self._clock()
        timers: dict[tuple[str, int], _Timer] = {}
        over: set[tuple[str, int]] = set()
        records: dict[tuple[str, int], float] = {}
        for row in running:
            limit = time_limits.time_limit_of({"time_limit_seconds": row.time_limit_seconds})
            if limit is None:
                continue
            key = (row.id, row.attempt)
            timer = timers[key] = self._timers.get(key) or await self._start_timer(row, now)
            own = timer.seconds_before + now - timer.seen_at
            if timer.earlier_seconds + own >= limit:
                over.add(key)
            if now - timer.recorded_at >= RECORD_SECONDS or (
                key in over and (row.ran_seconds or 0.0) < limit - timer.earlier_seconds
            ):
                records[key] = own
                timer.recorded_at = now
        self._timers = timers
        await self._record(records)
        return over

    async def _start_timer(self, row: Running, now: float) -> _Timer:
        async with self._database.read() as session:
            earlier = await time_limits.seconds_before_attempt(session, row.id, row.attempt)
        by_system_clock = (utc_now() - row.started_at).total_seconds()
        return _Timer(earlier, max(row.ran_seconds or 0.0, by_system_clock, 0.0), seen_at=now)

    async def _record(self, records: dict[tuple[str, int], float]) -> None:
        if not records:
            return
        async with self._database.write() as session:
            for (job_id, attempt), seconds in records.items():
                is_running = and_(
                    AttemptRow.job_id == job_id, AttemptRow.attempt == attempt, AttemptRow.finished_at.is_(None)
                )
                await session.execute(update(AttemptRow).where(is_running).values(ran_seconds=seconds))
