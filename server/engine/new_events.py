"""Reads the new events of jobs for their live streams.

All streams of a job are woken at the same time and wait for the same events, so one of them reads for all: a hundred
viewers cost the database as much as one, and the events are serialized once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from server.database.connections import Database
from server.database.tables import EventRow, JobRow
from server.engine.event_signal import EventSignal
from zeta_core.contract.job.events import UntypedEvent
from zeta_core.contract.job.status import ENDED, JobStatus

BATCH_EVENTS = 500


@dataclass(frozen=True)
class NewEvents:
    """Events as messages of an event stream, and the job's ``status`` when they were read; ``None``: it is deleted.

    ``last_seq`` is the ``seq`` of the last one, or the requested one if there are none. If they are a full batch, more
    may be stored already. ``is_end`` means that no further event will follow.
    """

    messages: bytes
    last_seq: int
    is_full_batch: bool
    status: JobStatus | None
    is_end: bool


@dataclass(frozen=True)
class _Reading:
    generation: int
    task: asyncio.Task[NewEvents]


class NewEventReader:
    def __init__(self, database: Database, signal: EventSignal) -> None:
        self._database = database
        self._signal = signal
        self._readings: dict[tuple[str, int], _Reading] = {}  # in progress, by job and the ``seq`` before

    async def read(self, job_id: str, after: int) -> NewEvents:
        """Up to `BATCH_EVENTS` events with ``seq`` above ``after``, including all that were notified before the call.
        A reading that another stream has begun is used, unless events were notified since then.
        Raises `DatabaseUnavailable`.
        """
        key, generation = (job_id, after), self._signal.generation(job_id)
        reading = self._readings.get(key)
        if reading is None or reading.generation != generation:
            reading = _Reading(generation, asyncio.create_task(self._read(job_id, after)))
            self._readings[key] = reading
            reading.task.add_done_callback(lambda task: self._forget(key, task))
        return await asyncio.shield(reading.task)

    def _forget(self, key: tuple[str, int], task: asyncio.Task[NewEvents]) -> None:
        if key in self._readings and self._readings[key].task is task:
            del self._readings[key]
        if not task.cancelled():
            task.exception()  # it was raised in every stream that is still there

    async def _read(self, job_id: str, after: int) -> NewEvents:
        events = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after)
        async with self._database.read() as session:
            job = (await session.execute(select(JobRow.status, JobRow.last_seq).where(JobRow.id == job_id))).first()
            rows = list(await session.scalars(events.order_by(EventRow.seq).limit(BATCH_EVENTS)))
        last_seq = rows[-1].seq if rows else after
        status = JobStatus(job.status) if job is not None else None
        return NewEvents(
            messages=b"".join(_message(row) for row in rows),
            last_seq=last_seq,
            is_full_batch=len(rows) == BATCH_EVENTS,
            status=status,
            is_end=job is None or (status in ENDED and job.last_seq <= last_seq),
        )


def to_event(row: EventRow) -> UntypedEvent:
    own: dict[str, Any] = {
        "seq": row.seq,
        "attempt": row.attempt,
        "type": row.type,
        "created_at": row.created_at,
    }
    return UntypedEvent.model_validate({**row.fields, **own})


def _message(row: EventRow) -> bytes:
    return f"id: {row.seq}\nevent: {row.type}\ndata: {to_event(row).model_dump_json()}\n\n".encode()
