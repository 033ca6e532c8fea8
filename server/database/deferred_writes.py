"""Rows that a transaction writes just before its commit, with one statement for all the jobs that it has changed.

`Database.write` calls `store_deferred`. Before that, the rows are not visible to the queries of the transaction.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.inserts import dialect_insert
from server.database.tables import EventRow, JobEndRow

_KEY = "deferred_writes"  # in the `info` of a session
_INSERT_EVENTS = insert(EventRow.metadata.tables[EventRow.__tablename__])  # faster than with the class


class DeferredWrites:
    """``events`` are rows of `EventRow`; ``ends`` counts the jobs that have ended, by reason."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.ends: Counter[str] = Counter()


def deferred_writes(session: AsyncSession) -> DeferredWrites:
    """The deferred rows of the session's transaction."""
    return session.info.setdefault(_KEY, DeferredWrites())


async def store_deferred(session: AsyncSession) -> None:
    """Write the deferred rows. The shared rows of `JobEndRow` come last, so they are locked only for a moment."""
    deferred: DeferredWrites | None = session.info.pop(_KEY, None)
    if deferred is None:
        return
    await session.flush()
    if deferred.events:
        await session.execute(_INSERT_EVENTS, deferred.events)
    if deferred.ends:
        # In the same order in every transaction, so that two transactions never wait for each other.
        counts = [{"reason": reason, "count": count} for reason, count in sorted(deferred.ends.items())]
        first = dialect_insert(session, JobEndRow).values(counts)
        added = JobEndRow.count + first.excluded.count
        await session.execute(first.on_conflict_do_update(index_elements=[JobEndRow.reason], set_={"count": added}))
