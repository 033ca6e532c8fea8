"""Ends an attempt on several workers: on all of them, with one reason.

Each worker publishes the last line of its node when no process of the node is left. The attempt ends when all have done
so. It also ends `END_SECONDS` after node 0 has ended or any node has failed, because the others can't continue. Their
workers then kill them (`NodeMonitor`), and the next attempt waits until they are released.

The reason is that of the node that explains the end best. A node that succeeded, paused or handed its job back before
node 0 doesn't end the attempt: all nodes stop together, and node 0 may still be storing its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from server.database.placements import PlacementRow, PlacementState, placements_of
from server.database.tables import JobRow
from server.engine.endings import end_attempt, lose_worker
from zeta_core.contract.job.events import StatusLine, utc_now
from zeta_core.contract.job.status import JobStatus, StatusReason

END_SECONDS = 10.0  # for the other nodes to notice that one has ended, and to report why they end
NODE_LOST = StatusReason.NODE_LOST  # the code of an error that another node caused by leaving


async def record_node_end(
    session: AsyncSession, job: JobRow, placement: PlacementRow, last: StatusLine, line: int
) -> None:
    """Record the last line of a node, with its number; ends the attempt of the locked job if all nodes have ended."""
    placement.last_line = last.model_dump(mode="json", exclude_none=True)
    placement.stored_line, placement.ended_at = line, utc_now()
    placement.state = PlacementState.RELEASED
    placements = await placements_of(session, job.id, placement.attempt)
    if all(row.last_line is not None for row in placements):
        await conclude(session, job, placements)


def is_decided(placements: Sequence[PlacementRow]) -> bool:
    """Whether a node has ended the attempt: node 0, or one that failed."""
    return bool(_decided_at(placements))


def is_overdue(placements: Sequence[PlacementRow]) -> bool:
    """Whether the nodes that are left have had enough time to end after one that ended the attempt."""
    times = _decided_at(placements)
    return bool(times) and (utc_now() - min(times)).total_seconds() >= END_SECONDS


async def conclude(session: AsyncSession, job: JobRow, placements: Sequence[PlacementRow]) -> None:
    """End the running attempt of a locked job with the best explanation among the nodes that have ended."""
    ended = [row for row in placements if row.last_line is not None]
    best = max(ended, key=lambda row: (_explanation(row), -row.node_rank))
    last = _last_line(best)
    first = placements[0]
    line = first.stored_line if first.last_line is not None else None
    if best.node_rank:
        last = _with_node_name(last, best)
    if last.error is not None and last.error.code == NODE_LOST:
        await lose_worker(session, job, message=last.error.message)
        return
    await end_attempt(session, job, last, line=line)


def _decided_at(placements: Sequence[PlacementRow]) -> list[datetime]:
    """When the nodes ended whose ends also end the attempt."""
    return [
        row.ended_at
        for row in placements
        if row.ended_at is not None and (row.node_rank == 0 or _last_line(row).status == JobStatus.FAILED)
    ]


def _explanation(row: PlacementRow) -> int:
    """How well the end of a node explains the end of the attempt; higher is better."""
    last = _last_line(row)
    code = None if last.error is None else last.error.code
    rank = None if last.error is None else last.error.evidence.rank
    match last.status:
        case JobStatus.SUCCEEDED:
            return 6 if row.node_rank == 0 else 0  # only node 0 knows that the final checkpoint is stored
        case JobStatus.FAILED if code == StatusReason.STALLED and rank is not None:
            return 5  # all nodes stall together; this one has the rank that hangs
        case JobStatus.FAILED:
            return 1 if code == NODE_LOST else 4
        case _:
            return 3 if last.reason == StatusReason.DISK_FULL else 2  # the others stop because of the full disk


def _with_node_name(last: StatusLine, row: PlacementRow) -> StatusLine:
    """The line with the name of the node in its texts."""
    name = f"Node {row.node_rank} ({row.worker}): "
    error = None if last.error is None else last.error.model_copy(update={"message": name + last.error.message})
    return last.model_copy(update={"message": last.message and name + last.message, "error": error})


def _last_line(row: PlacementRow) -> StatusLine:
    assert row.last_line is not None, f"node {row.node_rank} of {row.job_id} has not ended"
    return StatusLine.model_validate(row.last_line)
