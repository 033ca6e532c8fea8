"""Transactions on SQLite and PostgreSQL through one interface: ``read()`` and ``write()``.

SQLite runs in WAL mode with a single writing connection, guarded by an `asyncio.Lock`, because SQLite's own busy
handler makes concurrent writers wait for over a second. Readers have a separate pool and never wait for the writer. On
PostgreSQL, reads and writes share one pool.

Guarantees: `write()` is one transaction, committed at the end of the block and rolled back if the block raises; on
SQLite it holds the write lock from its first statement. Both raise `DatabaseUnavailable` while the database is
unavailable, and `write()` also if it can't get the write lock in time. Callers must not do network or disk work inside
the block. On PostgreSQL no session state outlives a transaction (prepared statements, settings), so PgBouncer can use
transaction pooling.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from server.database.availability import DatabaseUnavailable, is_connection_useless, reason_unavailable
from server.database.deferred_writes import store_deferred
from zeta_core.system.database_url import DatabaseAddress

# If another program locks an SQLite file for a long time, waiting writers fail instead of queueing indefinitely.
BUSY_TIMEOUT_SECONDS = 10
WRITER_TIMEOUT_SECONDS = 15.0
# Give up quickly on an unresponsive PostgreSQL server; the loops retry.
POSTGRES_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# Transactions take milliseconds. If a server freezes or is cut off, its transaction must not lock a job's row, and so
# block all other servers, for the hours until TCP gives up. psycopg parses times in the ISO style only, and an operator
# may have set another style for the cluster, the database or the role. The settings share one round trip with BEGIN,
# and are LOCAL because PgBouncer shares sessions.
POSTGRES_BEGIN = (
    "BEGIN; SET LOCAL lock_timeout = '10s'; SET LOCAL idle_in_transaction_session_timeout = '15s'; "
    "SET LOCAL datestyle = 'ISO'"
)
# A health check writes to SQLite with a short timeout, and at most this often.
PROBE_TIMEOUT_SECONDS = 2
PROBE_INTERVAL_SECONDS = 1.0
PROBE = text("UPDATE alembic_version SET version_num = version_num")


class Database:
    """The server's database connections. Create one per process, inside its event loop, and `close` it at the end."""

    def __init__(self, url: str) -> None:
        """Raises `ValueError` if the URL is invalid; settings are validated earlier."""
        self.address = DatabaseAddress.parse(url)
        self.is_sqlite = self.address.backend == "sqlite"
        self._write_lock = asyncio.Lock() if self.is_sqlite else None
        if self.is_sqlite:
            file = _SqliteFile(self.address.database)
            self._writer = _sqlite_engine(file, connections=1, begin="BEGIN IMMEDIATE")
            self._reader = _sqlite_engine(file, connections=4, begin="BEGIN")
            self._prober = _sqlite_engine(
                file, connections=1, begin="BEGIN IMMEDIATE", busy_timeout_seconds=PROBE_TIMEOUT_SECONDS
            )
        else:
            self._writer = self._reader = self._prober = _postgres_engine(self.address)
        self._probe_lock = asyncio.Lock()
        self._probed_at = float("-inf")  # monotonic
        self._probe_failure: DatabaseUnavailable | None = None
        self._write_failed = False

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncSession]:
        """One transaction that may change rows."""
        if self._write_lock is None:
            async with self._write_with(self._writer) as session:
                yield session
            return
        try:
            async with asyncio.timeout(WRITER_TIMEOUT_SECONDS):
                await self._write_lock.acquire()
        except TimeoutError as error:
            raise DatabaseUnavailable(
                f"the write lock was not available within {WRITER_TIMEOUT_SECONDS:g} s"
            ) from error
        try:
            async with self._write_with(self._writer) as session:
                yield session
        finally:
            self._write_lock.release()

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncSession]:
        """A read-only transaction: a consistent snapshot that writers don't block."""
        with _database_errors():
            async with AsyncSession(self._reader, expire_on_commit=False) as session, session.begin():
                yield session

    async def check_writable(self) -> None:
        """Raise `DatabaseUnavailable` if the database is not writable now."""
        async with self._probe_lock:
            if not self.is_sqlite or time.monotonic() - self._probed_at >= PROBE_INTERVAL_SECONDS:
                try:
                    await self._probe()
                    self._probe_failure = None
                except DatabaseUnavailable as error:
                    self._probe_failure = error
                self._probed_at = time.monotonic()
            if self._probe_failure is not None:
                raise DatabaseUnavailable(self._probe_failure.reason)

    async def close(self) -> None:
        for engine in {self._writer, self._reader, self._prober}:
            await engine.dispose()

    async def _probe(self) -> None:
        if not self.is_sqlite and not self._write_failed:  # PostgreSQL reports it without a write
            async with self.read() as session:
                if await session.scalar(text("SELECT current_setting('transaction_read_only')")) == "on":
                    await (await session.connection()).invalidate()
                    raise DatabaseUnavailable("it is read-only")
            return
        async with self._write_with(self._prober) as session:
            await session.execute(PROBE)

    @asynccontextmanager
    async def _write_with(self, engine: AsyncEngine) -> AsyncGenerator[AsyncSession]:
        try:
            with _database_errors():
                async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
                    yield session
                    await store_deferred(session)
        except DatabaseUnavailable:
            self._write_failed = True
            raise
        self._write_failed = False


@contextmanager
def _database_errors() -> Generator[None]:
    """Raise `DatabaseUnavailable` for the errors of the driver that mean it."""
    try:
        yield
    except SQLAlchemyError as error:
        if (reason := reason_unavailable(error)) is not None:
            raise DatabaseUnavailable(reason) from error
        raise


class _SqliteFile:
    """The file of a database, which must stay the same one: SQLite goes on writing to a deleted or replaced file.

    Everything accepted after that would be lost at the next start.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.uri = f"file:{quote(os.fsencode(os.path.abspath(path)))}"
        self._identity: tuple[int, int] | None = None  # of the file that the connections opened

    def check_open(self) -> None:
        """Check the file, which a connection has open. Raises `DatabaseUnavailable`."""
        if self._identity is None:
            self._identity = self._current_identity()
        self.check()

    def check(self) -> None:
        """Raise `DatabaseUnavailable` if the file is not the one that earlier connections opened."""
        if self._identity is not None and self._current_identity() != self._identity:
            raise DatabaseUnavailable(
                f"{self.path} was deleted, moved or replaced while the server ran; put the file back, or restart the "
                "server to use another one"
            )

    def _current_identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino


def _sqlite_engine(
    file: _SqliteFile, *, connections: int, begin: str, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS
) -> AsyncEngine:
    engine = create_async_engine(
        # In the mode "rw" SQLite never creates a file, not even if it disappears after `check`.
        URL.create("sqlite+aiosqlite", database=file.uri, query={"mode": "rw", "uri": "true"}),
        poolclass=AsyncAdaptedQueuePool,
        pool_size=connections,
        max_overflow=0,
        connect_args={"timeout": busy_timeout_seconds, "isolation_level": None},
    )

    @event.listens_for(engine.sync_engine, "do_connect")
    def _check(*_arguments: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        file.check()

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        file.check_open()
        connection.exec_driver_sql(begin)

    @event.listens_for(engine.sync_engine, "invalidate")
    def _end_transaction(connection: Any, _record: Any, _error: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        # Cancelling a statement closes its connection, but SQLite keeps the transaction open while anything refers to
        # the statement, which would block all writers. The rollback waits for the statement and ends the transaction.
        with suppress(Exception):  # fails if the file is damaged or missing
            connection.rollback()

    _replace_useless_connections(engine)
    return engine


def postgres_arguments(address: DatabaseAddress) -> dict[str, Any]:
    """The arguments of psycopg's ``connect``; the operator's options override the defaults."""
    hosts = [host for host, _ in address.hosts]
    ports = ["" if port is None else str(port) for _, port in address.hosts]
    named = {
        "host": ",".join(hosts),
        "port": ",".join(ports) if any(ports) else "",
        "dbname": address.database,
        "user": address.username,
        "password": address.password,
    }
    return {
        **POSTGRES_CONNECTION,
        **{name: value for name, value in named.items() if value},
        **address.options,
        "prepare_threshold": None,  # PgBouncer may give each transaction another session
    }


def _postgres_engine(address: DatabaseAddress) -> AsyncEngine:
    engine = create_async_engine(
        URL.create("postgresql+psycopg"),
        pool_size=8,
        max_overflow=8,
        pool_pre_ping=True,
        connect_args=postgres_arguments(address),
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.autocommit = True  # the driver must not begin transactions; `_begin` does

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.exec_driver_sql(POSTGRES_BEGIN)

    _replace_useless_connections(engine)
    return engine


def _replace_useless_connections(engine: AsyncEngine) -> None:
    """After a failover or a damaged file, the next transaction gets a new connection instead of the same error."""

    @event.listens_for(engine.sync_engine, "handle_error")
    def _invalidate_useless(context: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        if is_connection_useless(context.original_exception):
            context.is_disconnect = True
