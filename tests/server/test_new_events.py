"""Reading new events for live streams: once for all viewers of a job, and never without a notified event."""

import asyncio
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from server.database import events
from server.database.connections import Database
from server.database.tables import JobRow
from server.database.transitions import create_jobs, lock_job
from server.engine.event_signal import READER_SECONDS, EventSignal
from server.engine.new_events import NewEventReader
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import utc_now


async def stored_job(database: Database) -> str:
    row = JobRow(
        id=new_id("job"),
        project="default",
        created_by="key_test",
        spec={},
        resolved_spec_json={},
        priority=0,
        max_retries=3,
        created_at=utc_now(),
    )
    async with database.write() as session:
        await create_jobs(session, [row])
    return row.id


async def store_event(database: Database, job_id: str, message: str) -> None:
    async with database.write() as session:
        job = await lock_job(session, job_id)
        assert job is not None
        events.append(session, job, attempt=1, line=None, type="log", created_at=utc_now(), fields={"message": message})


@contextmanager
def executed_statements() -> Generator[list[str]]:
    """The SQL statements that are executed in the block."""
    statements: list[str] = []

    def record(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", record)


@pytest.mark.anyio
async def test_a_hundred_viewers_cost_one_reading(database: Database) -> None:
    job_id, signal = await stored_job(database), EventSignal()
    reader = NewEventReader(database, signal)
    with signal.subscribe(job_id), executed_statements() as statements:
        found = await asyncio.gather(*(reader.read(job_id, 0) for _ in range(100)))
    assert len({id(new) for new in found}) == 1
    assert len([statement for statement in statements if "FROM events" in statement]) == 1


@pytest.mark.anyio
async def test_a_reading_that_began_before_a_notification_is_not_shared(database: Database) -> None:
    job_id, signal = await stored_job(database), EventSignal()
    reader = NewEventReader(database, signal)
    after = (await reader.read(job_id, 0)).last_seq
    with signal.subscribe(job_id):
        early = asyncio.create_task(reader.read(job_id, after))
        await asyncio.sleep(0)
        await store_event(database, job_id, "new")
        signal.notify(job_id)
        late = await reader.read(job_id, after)
        assert b'"message":"new"' in late.messages
        await early
    assert (await reader.read(job_id, late.last_seq)).messages == b""


@pytest.mark.anyio
@pytest.mark.parametrize("num_readers", [1, 100])
async def test_the_more_readers_a_job_has_the_fewer_notifications_they_get(num_readers: int) -> None:
    signal, num_wakes, started = EventSignal(), 0, time.monotonic()
    with ExitStack() as subscribed:
        subscriptions = [subscribed.enter_context(signal.subscribe("job")) for _ in range(num_readers)]
        seen_generation = 0

        async def read_all() -> None:
            nonlocal num_wakes, seen_generation
            while seen_generation < 60:
                assert await subscriptions[0].wait(10), "the last notification is never lost"
                num_wakes, seen_generation = num_wakes + 1, signal.generation("job")

        reading = asyncio.create_task(read_all())
        for _ in range(60):
            signal.notify("job")
            await asyncio.sleep(0.01)
        await reading
    elapsed = time.monotonic() - started
    assert num_wakes <= elapsed / (READER_SECONDS * num_readers) + 2
    assert num_wakes >= 30 or num_readers > 1


@pytest.mark.anyio
async def test_a_notification_before_the_wait_is_not_lost_and_none_is_repeated() -> None:
    signal = EventSignal()
    with signal.subscribe("job") as subscription:
        assert not await subscription.wait(0.01)
        signal.notify("job")
        assert await subscription.wait(10)
        assert not await subscription.wait(0.01)
