"""Starts the run of an attempt on several workers: all nodes at once, or none.

    dispatched -> claimed -> prepared -> running          (`PlacementState`)

Each worker claims its node, fetches its inputs, and reports its address and port. When the last one is prepared, the
attempt starts, and the answer to each worker is `Go` with the addresses of all. Workers repeat their messages until
they are answered, so a lost answer only delays the start. `engine.nodes.monitor` gives up an attempt whose
workers are not prepared in time.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession

from server.database import events
from server.database.placements import PlacementRow, PlacementState, placements_of
from server.database.tables import AttemptRow, JobRow
from server.database.transitions import lock_job
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.messages import Claim, Go, JournalAck, Prepared
from zeta_core.contract.wire.node_group import NodeGroup


async def claim_node(session: AsyncSession, attempt: AttemptRow, claim: Claim) -> str | None:
    """Let the worker claim its node of a running attempt whose job is locked; returns why not, or ``None``."""
    for placement in await placements_of(session, attempt.job_id, attempt.attempt):
        if placement.worker != claim.worker:
            continue
        if placement.is_released:
            return "the node was released"
        if attempt.is_preparing and placement.state == PlacementState.DISPATCHED:
            placement.state, placement.incarnation = PlacementState.CLAIMED, claim.incarnation
        return None if placement.incarnation == claim.incarnation else "the node was claimed by another process"
    return "the attempt has no node on this worker"


async def answer_prepared(session: AsyncSession, message: Prepared) -> list[tuple[str, BaseModel]]:
    """Record that a node is prepared; returns the answers, with their workers.

    There is no answer while other nodes are missing. The last one starts the attempt, and all workers get their `Go`.
    """
    job = await lock_job(session, message.job_id)
    attempt = await session.get(AttemptRow, (message.job_id, message.attempt)) if job else None
    if job is None or attempt is None or job.status != JobStatus.RUNNING or job.attempt != message.attempt:
        return [_over(message)]
    placements = await placements_of(session, job.id, attempt.attempt)
    own = next((row for row in placements if row.node_rank == message.node_rank), None)
    if own is None or own.is_released or (own.worker, own.incarnation) != (message.worker, message.incarnation):
        return [_over(message)]
    if not attempt.is_preparing:
        return [_go(own, placements)]
    own.state, own.address, own.port = PlacementState.PREPARED, message.address, message.port
    if any(row.state != PlacementState.PREPARED for row in placements):
        return []
    await _start(session, job, attempt, placements)
    return [_go(row, placements) for row in placements]


async def _start(session: AsyncSession, job: JobRow, attempt: AttemptRow, placements: Sequence[PlacementRow]) -> None:
    """Record that the attempt runs from now on, because all its nodes are prepared; its running time now counts."""
    now = utc_now()
    attempt.is_preparing, attempt.started_at, attempt.ran_seconds = False, now, None
    for row in placements:
        row.state = PlacementState.RUNNING
    nodes = ", ".join(f"{row.worker} ({row.address})" for row in placements)
    fields = {"level": "info", "message": f"All {len(placements)} nodes are prepared and start: {nodes}."}
    events.append(session, job, attempt=attempt.attempt, line=None, type="log", created_at=now, fields=fields)


def _go(own: PlacementRow, placements: Sequence[PlacementRow]) -> tuple[str, BaseModel]:
    port = placements[0].port
    assert port is not None, f"{own.job_id}: node 0 is prepared and has no port"
    group = NodeGroup(node_rank=own.node_rank, addresses=[row.address or "" for row in placements], port=port)
    go = Go(job_id=own.job_id, attempt=own.attempt, incarnation=own.incarnation or "", group=group)
    return own.worker, go


def _over(message: Prepared) -> tuple[str, BaseModel]:
    """The answer to a node of an attempt that is over."""
    ack = JournalAck(job_id=message.job_id, attempt=message.attempt, stored_line=0, fenced=True)
    return message.worker, ack
