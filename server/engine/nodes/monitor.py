"""Monitors attempts on several workers: gives up one that can't start, ends one that lost a node, releases workers.

| situation                                                         | action                                          |
|-------------------------------------------------------------------|-------------------------------------------------|
| preparing, and a worker did not claim its node within             | the attempt ends on all nodes; the next one     |
|   ``claim_seconds``, was not prepared within ``prepare_seconds``, |   starts after a back-off (`endings`)           |
|   is silent or drained                                            |                                                 |
| preparing, and a node has ended, or a user cancels or pauses      | the attempt ends at once                        |
| running, and a node is lost                                       | the attempt ends: as `nodes.ends` decides if    |
|                                                                   |   node 0 has ended or one has failed, else      |
|                                                                   |   `lose_worker`                                 |
| running, and the others had time to end after one that ended      | the attempt ends (`nodes.ends`)                 |
| over, and a worker still has a node of it                         | tell the worker to kill the node's processes;   |
|                                                                   |   release the node when the worker no longer    |
|                                                                   |   lists it, or when its lease has expired       |
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import and_, select

from server.database.draining import drained_workers
from server.database.placements import (
    PlacementRow,
    PlacementState,
    placements_of,
    placements_of_jobs,
    unreleased_placements,
)
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import lock_job
from server.engine.endings import give_up_start, lose_worker
from server.engine.loops import raise_first, try_each
from server.engine.lost_attempts import ClaimedAttempt
from server.engine.monitor_resources import MonitorResources
from server.engine.nodes.ends import conclude, is_decided, is_overdue
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.messages import HEARTBEAT_GONE_SECONDS, JournalAck

logger = logging.getLogger(__name__)

_RUNNING = (
    select(JobRow.id, JobRow.attempt, JobRow.requested_action, AttemptRow.is_preparing)
    .join(AttemptRow, and_(AttemptRow.job_id == JobRow.id, AttemptRow.attempt == JobRow.attempt))
    .where(JobRow.status == JobStatus.RUNNING, AttemptRow.num_nodes > 1)
)


class NodeMonitor:
    def __init__(self, resources: MonitorResources, *, claim_seconds: float, prepare_seconds: float) -> None:
        self._database = resources.database
        self._workers = resources.workers
        self._send_to_worker = resources.send_to_worker
        self._event_signal = resources.event_signal
        self._slot_freed = resources.slot_freed
        self._claim_seconds = claim_seconds
        self._prepare_seconds = prepare_seconds
        self._lost = resources.lost_attempts()
        self._preparing_since: dict[tuple[str, int], float] = {}  # when this process first saw it (monotonic)

    async def one_pass(self) -> None:
        if not self._workers.is_connected:
            return
        async with self._database.read() as session:
            running = (await session.execute(_RUNNING)).all()
            placements = await placements_of_jobs(session, [row.id for row in running]) if running else {}
            unreleased = await unreleased_placements(session)
            drained = await drained_workers(session)
        lost = self._lost.find(_claimed_attempt(row) for row in unreleased if row.incarnation is not None)
        now = time.monotonic()
        preparing = [(row.id, row.attempt) for row in running if row.is_preparing]
        self._preparing_since = {key: self._preparing_since.get(key, now) for key in preparing}

        async def check(row: Any) -> None:
            await self._check_running(row, placements[row.id, row.attempt], lost, drained)

        async def release(row: PlacementRow) -> None:
            await self._release(row, is_lost=row.incarnation is None or _claimed_attempt(row) in lost)

        is_running = {(row.id, row.attempt) for row in running}
        over = [row for row in unreleased if (row.job_id, row.attempt) not in is_running]
        raise_first(await try_each(running, check), await try_each(over, release))

    # --- Running attempts --------------------------------------------------------------------------------------------

    async def _check_running(
        self,
        row: Any,
        placements: Sequence[PlacementRow],
        lost: dict[ClaimedAttempt, str],
        drained: Collection[str],
    ) -> None:
        lost_nodes = {
            node.node_rank: lost[_claimed_attempt(node)]
            for node in placements
            if not node.is_released and node.incarnation is not None and _claimed_attempt(node) in lost
        }
        if lost_nodes:
            rank, message = next(iter(lost_nodes.items()))
            await self._end(row.id, row.attempt, lost_node=rank, message=f"Node {rank}: {message}")
        elif row.is_preparing:
            seconds = time.monotonic() - self._preparing_since[row.id, row.attempt]
            has_ended = any(node.last_line is not None for node in placements)
            message = self._why_not_ready(placements, seconds, drained)
            if has_ended or row.requested_action is not None or message is not None:
                await self._end(row.id, row.attempt, message=message)
        elif is_overdue(placements):
            await self._end(row.id, row.attempt)

    def _why_not_ready(
        self, placements: Sequence[PlacementRow], seconds: float, drained: Collection[str]
    ) -> str | None:
        """Why an attempt that has been preparing for so long must be given up, or ``None``."""
        for node in placements:
            name = f"Worker {node.worker} (node {node.node_rank})"
            if node.worker in drained:
                return f"{name} is being drained."
            if node.state == PlacementState.DISPATCHED:
                if self._workers.silent_seconds(node.worker) > HEARTBEAT_GONE_SECONDS:
                    return f"{name} is no longer connected."
                if seconds > self._claim_seconds:
                    return f"{name} did not start within {self._claim_seconds:.0f} s."
            if node.state == PlacementState.CLAIMED and seconds > self._prepare_seconds:
                return f"{name} did not fetch its inputs within {self._prepare_seconds:.0f} s."
        return None

    async def _end(
        self, job_id: str, attempt: int, *, lost_node: int | None = None, message: str | None = None
    ) -> None:
        """End the attempt on all its nodes, unless it has ended or started in the meantime."""
        async with self._database.write() as session:
            job = await lock_job(session, job_id)
            row = await session.get(AttemptRow, (job_id, attempt))
            if job is None or row is None or job.status != JobStatus.RUNNING or job.attempt != attempt:
                return
            placements = await placements_of(session, job_id, attempt)
            if lost_node is not None:
                if placements[lost_node].is_released:
                    return
                placements[lost_node].state = PlacementState.RELEASED
                if is_decided(placements):
                    await conclude(session, job, placements)  # such as node 0 that has succeeded
                else:
                    await lose_worker(session, job, message=message or "")
            elif any(node.last_line is not None for node in placements):
                await conclude(session, job, placements)
            elif row.is_preparing:
                await give_up_start(session, job, message=message or "The start was stopped on request.")
            else:
                return
        logger.warning(
            "Ended attempt %d of %s on %d workers. %s",
            attempt,
            job_id,
            len(placements),
            message or "",
            extra={"action": "end_nodes", "job_id": job_id, "attempt": attempt},
        )
        self._event_signal.notify(job_id)
        self._slot_freed()

    # --- Attempts that are over --------------------------------------------------------------------------------------

    async def _release(self, placement: PlacementRow, *, is_lost: bool) -> None:
        """Release a node of an attempt that is over, or let its worker end it."""
        if not is_lost:
            over = JournalAck(
                job_id=placement.job_id, attempt=placement.attempt, stored_line=placement.stored_line, fenced=True
            )
            await self._send_to_worker(placement.worker, over)
            return
        async with self._database.write() as session:
            job = await lock_job(session, placement.job_id)
            row = await session.get(PlacementRow, (placement.job_id, placement.attempt, placement.node_rank))
            if job is None or row is None or (job.status == JobStatus.RUNNING and job.attempt == row.attempt):
                return
            row.state = PlacementState.RELEASED
        self._slot_freed()


def _claimed_attempt(placement: PlacementRow) -> ClaimedAttempt:
    assert placement.incarnation is not None, "a process has claimed it"
    return ClaimedAttempt(placement.job_id, placement.attempt, placement.worker, placement.incarnation)
