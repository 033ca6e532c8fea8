"""Stores why jobs wait, and when they will probably start, if that changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import update

from server.database.connections import Database
from server.database.tables import JobRow
from server.engine.candidate import Wait
from server.engine.dispatches import waiting_reason
from server.engine.scheduling.queue_pages import QueuedRow
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus

UPDATE_CHUNK = 100
# An estimate is stored again if it changed by more than this, or by this part of the remaining time.
TOLERANCE_SECONDS, TOLERANCE = 30.0, 0.1


async def store_reasons(
    database: Database, waits: Iterable[tuple[QueuedRow, Wait]], starts: Mapping[str, float] | None
) -> None:
    """Store the reasons that changed; ``since`` is when the current one began.

    ``starts`` are the estimated seconds until jobs start, by job; ``None`` if nothing was estimated in this pass.
    """
    now = utc_now()
    groups: dict[str, list[str]] = {}  # jobs by their new reason, as JSON
    for row, wait in waits:
        old: dict[str, Any] = row.waiting_reason or {}
        stored = _stored_estimate(old)
        estimate = stored if starts is None else _estimate(stored, starts.get(row.id), now)
        new = waiting_reason(wait, now, estimate)
        if all(old.get(name) == new[name] for name in ("code", "message", "details")):
            new["since"] = old["since"]
        if old != new:
            groups.setdefault(json.dumps(new), []).append(row.id)
    for reason, ids in groups.items():
        for start in range(0, len(ids), UPDATE_CHUNK):
            chunk = JobRow.id.in_(ids[start : start + UPDATE_CHUNK])
            async with database.write() as session:  # short, so that other writers don't wait long
                await session.execute(
                    update(JobRow)
                    .where(chunk, JobRow.status == JobStatus.QUEUED, JobRow.worker.is_(None))
                    .values(waiting_reason=json.loads(reason))
                )


def _stored_estimate(reason: Mapping[str, Any]) -> datetime | None:
    text = reason.get("estimated_start_at")
    return None if text is None else datetime.fromisoformat(text)


def _estimate(stored: datetime | None, seconds: float | None, now: datetime) -> datetime | None:
    """The estimated start; the stored one if it is about the same, so that it isn't written in each pass."""
    if seconds is None:
        return None
    new = now + timedelta(seconds=seconds)
    tolerance = timedelta(seconds=max(TOLERANCE_SECONDS, TOLERANCE * seconds))
    return new if stored is None or abs(stored - new) > tolerance else stored
