"""Applies the journals of the nodes after node 0, whose journal alone contains the events of the job.

The server keeps their warnings, which concern the node alone, such as a stall, with the node in the evidence. It also
keeps the last line, with which the node ends, and acknowledges all other lines, so that the worker can publish it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from server.database import events
from server.database.placements import PlacementRow
from server.database.tables import JobRow
from server.engine.nodes.ends import record_node_end
from zeta_core.contract.job.events import JournalLine, StatusLine, WarningLine
from zeta_core.contract.job.status import JobStatus


async def apply_node_line(
    session: AsyncSession, job: JobRow, placement: PlacementRow, line: JournalLine, *, number: int
) -> None:
    """Apply line ``number`` of the node's journal; ``job`` is locked and runs this attempt."""
    match line:
        case StatusLine() if line.status != JobStatus.RUNNING:
            await record_node_end(session, job, placement, line, number)
        case WarningLine():
            evidence: dict[str, Any] = {
                **(line.evidence or {}),
                "node": placement.node_rank,
                "worker": placement.worker,
            }
            warning = line.model_copy(update={"evidence": evidence})
            events.warn(job, warning)
            fields = warning.model_dump(mode="json", exclude={"type", "created_at"}, exclude_none=True)
            events.append(
                session,
                job,
                attempt=placement.attempt,
                line=None,
                type="warning",
                created_at=line.created_at,
                fields=fields,
            )
        case _:
            pass
    placement.stored_line = number
