"""A job's stored events: one page of them, or a live stream of server-sent events that can be resumed after any event.

A stream only reads the database, so it sends each event once and in order, whichever server process stored it. It ends
with the job, or when this server stops; the client then reconnects with its ``Last-Event-ID``. Source of the format:
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import EventRow, JobRow
from server.engine.new_events import to_event
from server.service import Service
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.events import UntypedEvent
from zeta_core.contract.job.responses import Page
from zeta_core.contract.job.status import ENDED, JobStatus

IsDisconnected = Callable[[], Awaitable[bool]]  # Request.is_disconnected

KEEP_ALIVE_SECONDS = 15.0
CONNECTION_CHECK_SECONDS = 1.0
# The polling interval without notifications, which finds the events that other servers stored.
POLL_SECONDS = 0.5
SINGLE_SERVER_POLL_SECONDS = 5.0


async def read_events(service: Service, job_id: str, after: int, limit: int) -> Page[UntypedEvent]:
    """Up to ``limit`` events with ``seq`` above ``after``, oldest first; ``first_id`` and ``last_id`` are ``seq``s."""
    async with service.database.read() as session:
        events = [to_event(row) for row in await _rows(session, job_id, after, limit + 1)]
    data = events[:limit]
    return Page(
        data=data,
        has_more=len(events) > limit,
        first_id=str(data[0].seq) if data else None,
        last_id=str(data[-1].seq) if data else None,
        next_after=str(data[-1].seq) if len(events) > limit else None,
    )


def last_event_id(header: str | None) -> int | None:
    """``Last-Event-ID`` as a ``seq``. Raises `InvalidRequest` for a value that this server never sent."""
    if header is None or header == "":
        return None
    if not header.isascii() or not header.isdigit() or len(header) > 15:
        raise InvalidRequest(
            f"Last-Event-ID is {header[:40]!r}; send the id of the last event that you received, which is an integer.",
            param="Last-Event-ID",
        )
    return int(header)


async def has_read_all(service: Service, job_id: str, after: int) -> bool:
    """Whether the job has ended and ``after`` is its last event, so that a client need not reconnect."""
    async with service.database.read() as session:
        job = await session.get(JobRow, job_id)
        return job is not None and JobStatus(job.status) in ENDED and job.last_seq <= after


async def stream_events(
    service: Service, job_id: str, after: int, is_disconnected: IsDisconnected
) -> AsyncGenerator[bytes]:
    """The stream's bytes, from the event after ``after``, until the client disconnects."""
    poll_seconds = SINGLE_SERVER_POLL_SECONDS if service.database.is_sqlite else POLL_SECONDS
    yield b"retry: 2000\n\n"
    sent_at = checked_at = time.monotonic()
    with service.engine.event_signal.subscribe(job_id) as subscription, service.stopping.wakes(subscription):
        while not service.stopping.requested:
            if time.monotonic() - checked_at >= CONNECTION_CHECK_SECONDS:  # a check takes as long as sending an event
                if await is_disconnected():
                    return
                checked_at = time.monotonic()
            new = await service.engine.new_events.read(job_id, after)
            if new.messages:
                after, sent_at = new.last_seq, time.monotonic()
                yield new.messages
            if new.is_full_batch:
                continue
            if new.is_end:
                ended = {"status": new.status or "deleted", "last_seq": after}
                yield f"event: end\ndata: {json.dumps(ended)}\n\n".encode()
                return
            silence = time.monotonic() - sent_at
            if silence >= KEEP_ALIVE_SECONDS:
                yield b": still here\n\n"
                sent_at, silence = time.monotonic(), 0.0
            # All streams poll at the same time, so that they share one reading.
            next_poll = poll_seconds - time.monotonic() % poll_seconds
            await subscription.wait(min(next_poll, KEEP_ALIVE_SECONDS - silence))


async def _rows(session: AsyncSession, job_id: str, after: int, limit: int) -> list[EventRow]:
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after)
    return list(await session.scalars(query.order_by(EventRow.seq).limit(limit)))
