"""A job's stored events: a page of them, or a live stream of server-sent events that resumes anywhere.

A stream reads the database and nothing else, so it shows each event once and in order, whichever server process stored
it. It ends with the job, or within a moment of the server's word to stop; a client then reconnects with its
``Last-Event-ID``. Source of the format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import EventRow, JobRow
from server.http.streaming import IsDisconnected
from server.service import Service
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.answers import Page
from zeta_core.contract.job.events import UntypedEvent
from zeta_core.contract.job.status import ENDED, JobStatus

COMMENT_SECONDS = 15.0
BATCH = 500
# How often the database is asked without a notification: another server's events are seen only this way.
POLL_SECONDS = 1.0
ALONE_POLL_SECONDS = 5.0


async def read_page(service: Service, job_id: str, after: int, limit: int) -> Page[UntypedEvent]:
    """Up to ``limit`` events with ``seq`` above ``after``, oldest first; ``first_id`` and ``last_id`` are ``seq``s."""
    async with service.database.read() as session:
        events = [_event(row) for row in await _rows(session, job_id, after, limit + 1)]
    data = events[:limit]
    return Page(
        data=data,
        has_more=len(events) > limit,
        first_id=str(data[0].seq) if data else None,
        last_id=str(data[-1].seq) if data else None,
    )


def last_event_id(header: str | None) -> int | None:
    """``Last-Event-ID`` as a ``seq``. Raises `InvalidRequest` for what this server never sent."""
    if header is None or header == "":
        return None
    if not header.isascii() or not header.isdigit() or len(header) > 15:
        raise InvalidRequest(
            f"Last-Event-ID is {header[:40]!r}; send the id of the last event that was read, a whole number.",
            param="Last-Event-ID",
        )
    return int(header)


async def is_read_to_its_end(service: Service, job_id: str, after: int) -> bool:
    """Whether the job has ended and nothing follows ``after``: a reconnect then needs no stream."""
    async with service.database.read() as session:
        job = await session.get(JobRow, job_id)
        return job is not None and JobStatus(job.status) in ENDED and job.last_seq <= after


async def live(service: Service, job_id: str, after: int, has_left: IsDisconnected) -> AsyncGenerator[bytes]:
    """The stream's bytes, from the event after ``after``, until its reader ``has_left``."""
    poll_seconds = ALONE_POLL_SECONDS if service.database.is_sqlite else POLL_SECONDS
    yield b"retry: 2000\n\n"
    spoke = time.monotonic()
    with service.engine.event_signal.subscribe(job_id) as subscription, service.stopping.wakes(subscription):
        while not (service.stopping.requested or await has_left()):
            async with service.database.read() as session:
                job = await session.get(JobRow, job_id)
                rows = await _rows(session, job_id, after, BATCH)
            if rows:
                after, spoke = rows[-1].seq, time.monotonic()
                yield b"".join(_message(row) for row in rows)
            if len(rows) == BATCH:
                continue
            if job is None or (JobStatus(job.status) in ENDED and job.last_seq <= after):
                ended = {"status": job.status if job else "deleted", "last_seq": after}
                yield f"event: end\ndata: {json.dumps(ended)}\n\n".encode()
                return
            silence = time.monotonic() - spoke
            if silence >= COMMENT_SECONDS:
                yield b": still here\n\n"
                spoke, silence = time.monotonic(), 0.0
            await subscription.wait(min(poll_seconds, COMMENT_SECONDS - silence))


async def _rows(session: AsyncSession, job_id: str, after: int, limit: int) -> list[EventRow]:
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after)
    return list(await session.scalars(query.order_by(EventRow.seq).limit(limit)))


def _event(row: EventRow) -> UntypedEvent:
    own: dict[str, Any] = {
        "seq": row.seq,
        "attempt": row.attempt,
        "type": row.type,
        "created_at": row.created_at,
    }
    return UntypedEvent.model_validate({**row.fields, **own})


def _message(row: EventRow) -> bytes:
    return f"id: {row.seq}\nevent: {row.type}\ndata: {_event(row).model_dump_json()}\n\n".encode()
