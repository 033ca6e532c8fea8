"""One database behind two doors: ``read()`` and ``write()``, the same on SQLite and PostgreSQL.

SQLite runs in WAL mode with a single writing connection, whose queue is an `asyncio.Lock`: many writers sleep in its
busy handler and get a tail of over a second (measured in the project's baselines). Readers have a pool of their own
and never wait for the writer. On PostgreSQL both doors share one pool.

Guarantees: `write()` is one transaction, committed when the block ends and rolled back when it raises; on SQLite it
holds the write lock from its first statement, and raises `WriterBusy` where its turn does not come. Neither door may be
held across network or disk work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.exc import TimeoutError as WriterBusy
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from zeta_core.contract.errors import InvalidSettings

# Another program may lock an SQLite file for long: then those who wait are told so, instead of all waiting in a row.
BUSY_TIMEOUT_SECONDS = 10
WRITER_TIMEOUT_SECONDS = 15.0
# Nobody waits for a PostgreSQL that does not answer: the loops go round again.
POSTGRES_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# Transactions take milliseconds. One whose server stands still or is cut off must not hold a job's row, and with it all
# other servers, for hours, which is how long TCP itself would wait.
POSTGRES_SESSION = "SET lock_timeout = '10s'; SET idle_in_transaction_session_timeout = '15s'"


class Database:
    """The server's connections. Create one per process, inside its event loop; `close` it at the end."""

    def __init__(self, url: str) -> None:
        self.url = async_url(url)
        self.is_sqlite = make_url(self.url).get_backend_name() == "sqlite"
        self._write_lock = asyncio.Lock() if self.is_sqlite else None
        if self.is_sqlite:
            self._writer = _sqlite_engine(self.url, connections=1, begin="BEGIN IMMEDIATE")
            self._reader = _sqlite_engine(self.url, connections=4, begin="BEGIN")
        else:
            self._writer = self._reader = _postgres_engine(self.url)

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncSession]:
        """One transaction that may change rows."""
        if self._write_lock is None:
            async with AsyncSession(self._writer, expire_on_commit=False) as session, session.begin():
                yield session
            return
        try:
            async with asyncio.timeout(WRITER_TIMEOUT_SECONDS):
                await self._write_lock.acquire()
        except TimeoutError as error:
            raise WriterBusy(f"no turn to write came for {WRITER_TIMEOUT_SECONDS:g} s") from error
        try:
            async with AsyncSession(self._writer, expire_on_commit=False) as session, session.begin():
                yield session
        finally:
            self._write_lock.release()

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncSession]:
        """One transaction that only reads: a consistent view that no writer blocks."""
        async with AsyncSession(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    async def close(self) -> None:
        await self._writer.dispose()
        if self._reader is not self._writer:
            await self._reader.dispose()


def async_url(url: str) -> str:
    """The URL with the driver that this server uses: aiosqlite, or psycopg in its asynchronous form."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidSettings(
            "ZETA_DATABASE_URL is no database URL; use sqlite:///FILE or postgresql://...", param="ZETA_DATABASE_URL"
        ) from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return parsed.set(drivername="sqlite+aiosqlite").render_as_string(hide_password=False)
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    raise InvalidSettings(
        f"ZETA_DATABASE_URL names the database {backend!r}; use sqlite:///FILE or postgresql://...",
        param="ZETA_DATABASE_URL",
    )


def _sqlite_engine(url: str, *, connections: int, begin: str) -> AsyncEngine:
    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=connections,
        max_overflow=0,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.exec_driver_sql(begin)

    @event.listens_for(engine.sync_engine, "invalidate")
    def _let_go(connection: Any, _record: Any, _error: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        # A cancelled statement costs its connection, and SQLite keeps the transaction of a closed one for as long as
        # anything refers to the statement: nobody could write. This waits for the statement, and ends the transaction.
        connection.rollback()

    return engine


def _postgres_engine(url: str) -> AsyncEngine:
    engine = create_async_engine(
        url, pool_size=8, max_overflow=8, pool_pre_ping=True, connect_args=dict(POSTGRES_CONNECTION)
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        cursor = connection.cursor()
        cursor.execute(POSTGRES_SESSION)
        cursor.close()
        connection.commit()

    return engine
