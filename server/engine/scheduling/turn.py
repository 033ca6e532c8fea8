"""Lets one server schedule at a time, whatever the number of servers on a database.

The server holds PostgreSQL's advisory lock in a transaction during its pass; a server that is killed or cut off loses
it with its connection. Nothing depends on a former holder: a pass begins with what the database contains, and each
dispatch checks that its slots are still free. SQLite has one server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.connections import Database

TURN_LOCK = 0x7A657462  # the key of PostgreSQL's advisory lock
WAIT_SECONDS = 5.0
POLL_SECONDS = 0.02


class Turn:
    """The right to schedule. Without a ``session``, this server is the only one."""

    def __init__(self, session: AsyncSession | None) -> None:
        self._session = session

    async def keep(self) -> None:
        """Call this at least every few seconds, because an idle transaction ends. Raises `DatabaseUnavailable`."""
        if self._session is not None:
            await self._session.execute(text("SELECT 1"))


@asynccontextmanager
async def scheduling_turn(database: Database) -> AsyncGenerator[Turn | None]:
    """Wait until no other server schedules; ``None`` if that takes longer than `WAIT_SECONDS`."""
    if database.is_sqlite:
        yield Turn(None)
        return
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        # A new transaction each time: while it waits, this server holds no connection of PgBouncer.
        async with database.read() as session:
            if await session.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": TURN_LOCK}):
                yield Turn(session)
                return
        await asyncio.sleep(POLL_SECONDS)
    yield None
