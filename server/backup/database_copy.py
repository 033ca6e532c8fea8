"""Saving the database to one SQLite file, and restoring it to an empty database of either kind.

Guarantees: a saved database is one consistent state, while servers continue to write. A database is restored completely
or not at all, and an existing one is never changed.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import URL, Engine, create_engine, delete, func, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from server.backup.table_rows import copy_rows
from server.database.connections import postgres_arguments
from server.database.file_tables import FileRow
from server.database.schema import cannot_open
from server.database.tables import JobRow, ServiceRow
from zeta_core.contract.errors import Conflict, InvalidRequest, Unavailable
from zeta_core.system.database_url import DatabaseAddress, sqlite_url
from zeta_core.system.durable_files import flush, rename_durably

BUSY_TIMEOUT_SECONDS = 30


def save_database(url: str, target: Path, environment: Mapping[str, str]) -> None:
    """Copy the database at ``url`` to the new SQLite file ``target``.

    ``environment`` is that of the process, for the program that creates the schema. Raises `Unavailable`.
    """
    address = DatabaseAddress.parse(url)
    try:
        if address.backend == "sqlite":
            with (
                closing(sqlite3.connect(address.database, timeout=BUSY_TIMEOUT_SECONDS)) as source,
                closing(sqlite3.connect(target)) as copy,
            ):
                source.backup(copy)
        else:
            migrate(sqlite_url(target), environment)
            with (
                open_engine(address, isolation_level="REPEATABLE READ") as source,
                open_engine(DatabaseAddress("sqlite", str(target))) as copy,
                source.connect() as reading,
                copy.begin() as writing,
            ):
                copy_rows(reading, writing)
        _remove_write_ahead_log(target)
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise cannot_open(address, error) from error


def require_empty(url: str) -> None:
    """Raise `Conflict` if a service has used the database at ``url``, and `Unavailable` if it can't be opened."""
    address = DatabaseAddress.parse(url)
    if address.backend == "sqlite":
        is_used = Path(address.database).exists()
    else:
        try:
            with open_engine(address) as opened, opened.connect() as connection:
                existing = set(inspect(connection).get_table_names())
                rows = [ServiceRow, JobRow, FileRow]
                is_used = any(
                    connection.scalar(select(func.count()).select_from(row))
                    for row in rows
                    if row.__tablename__ in existing
                )
        except SQLAlchemyError as error:
            raise cannot_open(address, error) from error
    if is_used:
        raise Conflict(
            f"The database {address.location} already exists; restore into another ZETA_HOME or ZETA_DATABASE_URL.",
            code="not_empty",
        )


def restore_database(saved: Path, url: str, environment: Mapping[str, str]) -> None:
    """Restore the database at ``url`` from the SQLite file ``saved``, with the schema of this version.

    It becomes the database of a new service, so that it can run beside the one that was backed up. Raises
    `InvalidRequest` if ``saved`` is not a database, `Unavailable`, and the errors of `require_empty`.
    """
    address = DatabaseAddress.parse(url)
    require_empty(url)
    folder = Path(address.database).parent if address.backend == "sqlite" else None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".restore-") as work:
        copy = Path(work) / "zeta.db"
        try:
            with closing(sqlite3.connect(saved)) as source, closing(sqlite3.connect(copy)) as written:
                source.backup(written)
        except sqlite3.DatabaseError as error:
            raise InvalidRequest(
                f"The database of the backup is not a SQLite database ({error}); use another backup.",
                code="damaged_backup",
            ) from error
        migrate(sqlite_url(copy), environment)
        try:
            with open_engine(DatabaseAddress("sqlite", str(copy))) as opened, opened.begin() as connection:
                connection.execute(delete(ServiceRow))
            if address.backend == "postgresql":
                migrate(url, environment)
                with (
                    open_engine(DatabaseAddress("sqlite", str(copy))) as source,
                    open_engine(address) as target,
                    source.connect() as reading,
                    target.begin() as writing,
                ):
                    copy_rows(reading, writing)
                return
        except SQLAlchemyError as error:
            raise cannot_open(address, error) from error
        _remove_write_ahead_log(copy)
        flush(copy)
        require_empty(url)
        rename_durably(copy, Path(address.database))


def migrate(url: str, environment: Mapping[str, str]) -> None:
    """Create or upgrade the schema of the database at ``url``. Raises `Unavailable`."""
    variables = {name: value for name, value in environment.items() if name != "ZETA_DATABASE_URL_FILE"}
    command = [sys.executable, "-P", "-m", "migrations"]
    done = subprocess.run(
        command, env={**variables, "ZETA_DATABASE_URL": url}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Unavailable(f"The schema of the database could not be created: {done.stderr.strip()}")


@contextmanager
def open_engine(address: DatabaseAddress, *, isolation_level: str | None = None) -> Generator[Engine]:
    """A synchronous engine for existing databases, closed at the end."""
    options = {} if isolation_level is None else {"isolation_level": isolation_level}
    if address.backend == "postgresql":
        opened = create_engine(URL.create("postgresql+psycopg"), connect_args=postgres_arguments(address), **options)
    else:
        opened = create_engine(URL.create("sqlite", database=address.database))
    try:
        yield opened
    finally:
        opened.dispose()


def _remove_write_ahead_log(database: Path) -> None:
    """Make a SQLite database a single file: merge its write-ahead log into it."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
