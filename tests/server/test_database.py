"""Transactions on SQLite: cancellation leaves nothing behind, and a missing file is never created."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from server.database.availability import DatabaseUnavailable
from server.database.connections import Database

LONG = "WITH RECURSIVE c(x) AS (SELECT begin() UNION ALL SELECT x + 1 FROM c WHERE x < 300000) SELECT count(*) FROM c"


def test_a_write_cancelled_in_a_statement_is_rolled_back_and_unlocks(tmp_path: Path) -> None:
    async def run() -> None:
        (tmp_path / "zeta.db").touch()
        database = Database(f"sqlite:///{tmp_path / 'zeta.db'}")
        async with database.write() as session:
            await session.execute(text("CREATE TABLE numbers (number INTEGER)"))
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def begin() -> int:
            """Called by SQLite, in the connection's own thread, while it computes `LONG`."""
            loop.call_soon_threadsafe(begun.set)
            return 1

        async def write() -> None:
            async with database.write() as session:
                connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection
                await connection.create_function("begin", 0, begin)
                await session.execute(text("INSERT INTO numbers VALUES (1)"))
                await session.execute(text(LONG))

        cancelled = asyncio.create_task(write())
        await begun.wait()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError) as _kept:  # what it refers to is what held the lock
            await cancelled
        async with database.write() as session:
            await session.execute(text("INSERT INTO numbers VALUES (2)"))
        async with database.read() as session:
            assert list(await session.scalars(text("SELECT number FROM numbers"))) == [2]
        await database.close()

    asyncio.run(run())


def test_connecting_never_creates_the_file(tmp_path: Path) -> None:
    async def run() -> None:
        database = Database(f"sqlite:///{tmp_path / 'zeta.db'}")
        with pytest.raises(DatabaseUnavailable):
            async with database.write() as session:
                await session.execute(text("SELECT 1"))
        await database.close()

    asyncio.run(run())
    assert not (tmp_path / "zeta.db").exists()
