"""Distinguishes an unavailable database (down, overloaded, read-only, full, damaged) from errors in our statements.

`Database.read` and `Database.write` raise `DatabaseUnavailable` for the former, whatever exception the driver raised:
HTTP answers 503 and the loops retry. All other exceptions pass through unchanged.
"""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from zeta_core.contract.errors import Unavailable

# Classes and codes of https://www.postgresql.org/docs/current/errcodes-appendix.html: connections, authorization,
# conflicting transactions, resources, locks, operator intervention, system errors, configuration, internal errors.
UNAVAILABLE_CLASSES = ("08", "28", "40", "53", "55", "57", "58", "F0", "XX")
UNAVAILABLE_STATES = frozenset(
    {
        "25006",  # read_only_sql_transaction: the primary became a replica
        "25P03",  # idle_in_transaction_session_timeout
        "25P04",  # transaction_timeout
        "42501",  # insufficient_privilege: how some hosting providers stop writes above a quota
    }
)
# The session can no longer be used, although psycopg may not have noticed yet.
USELESS_CLASSES = ("08", "58", "XX")
USELESS_STATES = frozenset({"25006", "57P01", "57P02", "57P03", "57P05"})
# Result codes of https://www.sqlite.org/rescode.html that the driver does not raise as an OperationalError.
UNAVAILABLE_IN_SQLITE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
USELESS_IN_SQLITE = UNAVAILABLE_IN_SQLITE | {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}


class DatabaseUnavailable(Unavailable):
    """The database is unavailable. ``reason`` is meant for the log, because it may contain hosts and user names."""

    code = "database_unavailable"

    def __init__(self, reason: str) -> None:
        super().__init__("The database is unavailable; try again.")
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def reason_unavailable(error: BaseException) -> str | None:
    """The reason why the database is unavailable, in one line; ``None`` if the error has another cause."""
    if isinstance(error, DatabaseUnavailable):
        return error.reason
    if isinstance(error, PoolTimeout):
        return first_line(error)
    if not isinstance(error, DBAPIError):
        return None
    state, sqlite_code = _sqlstate(error.orig), _sqlite_code(error.orig)
    if (
        error.connection_invalidated
        or isinstance(error, OperationalError | InterfaceError)
        or state[:2] in UNAVAILABLE_CLASSES
        or state in UNAVAILABLE_STATES
        or sqlite_code in UNAVAILABLE_IN_SQLITE
    ):
        return first_line(error)
    return None


def is_connection_useless(driver_error: BaseException | None) -> bool:
    """Whether the connection that raised this error, and older ones in its pool, must be replaced."""
    state = _sqlstate(driver_error)
    return state[:2] in USELESS_CLASSES or state in USELESS_STATES or _sqlite_code(driver_error) in USELESS_IN_SQLITE


def first_line(error: BaseException) -> str:
    """The first line of the driver's message, without SQLAlchemy's statement, parameters and link."""
    message = str(error.orig if isinstance(error, DBAPIError) else error)
    return next((line.strip().rstrip(".") for line in message.splitlines() if line.strip()), type(error).__name__)


def _sqlstate(driver_error: BaseException | None) -> str:
    return getattr(driver_error, "sqlstate", None) or ""


def _sqlite_code(driver_error: BaseException | None) -> int | None:
    """The primary result code, without the extension in its upper bits."""
    code = getattr(driver_error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
