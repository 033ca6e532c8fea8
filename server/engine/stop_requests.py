"""Which running trainings are told to end: as the user asked, at their time limit, or because their worker is drained.

An order is due in each pass until the attempt has ended, so one that is lost is repeated. The time limit is counted by
this process's monotonic clock from where the database left it; see `database.time_limits`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, select, update

from server.database import time_limits
from server.database.connections import Database
from server.database.tables import AttemptRow, JobRow
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.messages import StopOrder

NOTE_SECONDS = 10.0  # how often the running time is written down: what a killed server can at most forget
Running = Any  # a row of `RUNNING`

logger = logging.getLogger(__name__)

RUNNING = (
    select(
        JobRow.id,
        JobRow.attempt,
        JobRow.requested_action,
        JobRow.spec["time_limit_seconds"].label("time_limit_seconds"),
        AttemptRow.worker,
        AttemptRow.incarnation,
        AttemptRow.started_at,
        AttemptRow.ran_seconds,
    )
    .join(AttemptRow, and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == JobRow.attempt))
    .where(JobRow.status == JobStatus.RUNNING)
)


@dataclass
class _Timed:
    """A running attempt with a limit: seconds of the earlier attempts, and of its own until it was first seen here."""

    earlier: float
    own_before: float
    seen_at: float  # monotonic
    noted_at: float = -NOTE_SECONDS  # monotonic; the first pass notes


class StopRequests:
    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._timed: dict[tuple[str, int], _Timed] = {}

    async def due(self, running: Sequence[Running], drained: Collection[str]) -> list[tuple[str, StopOrder]]:
        """Every order that is to be sent now, with its worker. What the user asked comes first."""
        out_of_time = await self._out_of_time(running)
        orders: list[tuple[str, StopOrder]] = []
        for row in running:
            key = (row.id, row.attempt)
            if row.requested_action is not None:
                orders.append((row.worker, StopOrder(job_id=row.id, attempt=row.attempt, action=row.requested_action)))
            elif key in out_of_time:
                orders.append((row.worker, StopOrder(job_id=row.id, attempt=row.attempt, action="time_limit")))
            elif row.worker in drained:
                orders.append((row.worker, StopOrder(job_id=row.id, attempt=row.attempt, action="hand_back")))
        return orders

    async def _out_of_time(self, running: Sequence[Running]) -> set[tuple[str, int]]:
        """The attempts with which their jobs have used up their ``time_limit_seconds``."""
        now = self._clock()
        timed: dict[tuple[str, int], _Timed] = {}
        over: set[tuple[str, int]] = set()
        notes: dict[tuple[str, int], float] = {}
        for row in running:
            limit = time_limits.limit_of({"time_limit_seconds": row.time_limit_seconds})
            if limit is None:
                continue
            key = (row.id, row.attempt)
            clock = timed[key] = self._timed.get(key) or await self._first_seen(row, now)
            own = clock.own_before + now - clock.seen_at
            if clock.earlier + own >= limit:
                over.add(key)
            if now - clock.noted_at >= NOTE_SECONDS or (
                key in over and (row.ran_seconds or 0.0) < limit - clock.earlier
            ):
                notes[key] = own
                clock.noted_at = now
        self._timed = timed
        await self._note(notes)
        return over

    async def _first_seen(self, row: Running, now: float) -> _Timed:
        async with self._database.read() as session:
            earlier = await time_limits.earlier_seconds(session, row.id, row.attempt)
        by_the_wall = (utc_now() - row.started_at).total_seconds()
        return _Timed(earlier, max(row.ran_seconds or 0.0, by_the_wall, 0.0), seen_at=now)

    async def _note(self, notes: dict[tuple[str, int], float]) -> None:
        if not notes:
            return
        async with self._database.write() as session:
            for (job_id, attempt), seconds in notes.items():
                still = and_(
                    AttemptRow.job_id == job_id, AttemptRow.attempt == attempt, AttemptRow.finished_at.is_(None)
                )
                await session.execute(update(AttemptRow).where(still).values(ran_seconds=seconds))
