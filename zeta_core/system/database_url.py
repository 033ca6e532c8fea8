"""Strict parser for ZETA_DATABASE_URL, which also accepts the URL variants of hosting providers.

libpq's options are an allow-list. A few well-known options of other client libraries are translated if that has no side
effects. Every other option is rejected by name, so nothing that an operator wrote is dropped silently.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote_to_bytes

# The parts are split as SQLAlchemy does (sqlalchemy/engine/url.py), so a password may contain '/', '?' and '#'.
_URL = re.compile(
    r"(?P<scheme>[\w.+-]+)://"
    r"(?:(?P<user>[^:/@]*)(?::(?P<password>[^@]*))?@)?"
    r"(?P<hosts>[^/?@]*)(?:/(?P<database>[^?]*))?(?:\?(?P<query>.*))?"
)
_HOST = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>[^:]*))?")
POSTGRES_SCHEMES = ("postgresql", "postgres")
# The driver is always psycopg 3; a URL for another driver refers to the same database.
POSTGRES_DRIVERS = ("", "psycopg", "psycopg_async", "psycopg2", "psycopg2cffi", "asyncpg", "pg8000")
SQLITE_DRIVERS = ("", "aiosqlite", "pysqlite")
EXAMPLES = "use sqlite:////absolute/path/zeta.db or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
# https://www.postgresql.org/docs/18/libpq-connect.html#LIBPQ-PARAMKEYWORDS
# fmt: off
LIBPQ_OPTIONS = frozenset({
    "application_name", "channel_binding", "client_encoding", "connect_timeout", "dbname",
    "fallback_application_name", "gssdelegation", "gssencmode", "gsslib", "host", "hostaddr", "keepalives",
    "keepalives_count", "keepalives_idle", "keepalives_interval", "krbsrvname", "load_balance_hosts",
    "max_protocol_version", "min_protocol_version", "options", "passfile", "password", "port", "replication",
    "require_auth", "requirepeer", "requiressl", "service", "servicefile", "ssl_max_protocol_version",
    "ssl_min_protocol_version", "sslcert", "sslcertmode", "sslcompression", "sslcrl", "sslcrldir", "sslkey",
    "sslkeylogfile", "sslmode", "sslnegotiation", "sslpassword", "sslrootcert", "sslsni", "target_session_attrs",
    "tcp_user_timeout", "user",
})
# fmt: on
NUMBERS = frozenset(
    {"connect_timeout", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "tcp_user_timeout"}
)
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# The values of `ssl` in asyncpg and node-postgres, as `sslmode`.
SSL_MODE_OF = {
    **{mode: mode for mode in SSL_MODES},
    "true": "require",
    "1": "require",
    "false": "disable",
    "0": "disable",
}


@dataclass(frozen=True)
class DatabaseAddress:
    """The location of a database and its connection parameters; ``options`` are libpq options."""

    backend: Literal["sqlite", "postgresql"]
    database: str  # for SQLite the path of the file; for PostgreSQL a name, or empty for libpq's default
    hosts: tuple[tuple[str, int | None], ...] = ()
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    options: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def parse(cls, url: str) -> DatabaseAddress:
        """Raises `ValueError` with a sentence that never contains the URL, which may contain a password."""
        parts = _URL.fullmatch(url.strip())
        if parts is None:
            raise ValueError(f"it is not a valid database URL; {EXAMPLES}, with special characters percent-encoded")
        backend, _, driver = parts["scheme"].partition("+")
        if backend == "sqlite" and driver in SQLITE_DRIVERS:
            return _sqlite(parts)
        if backend in POSTGRES_SCHEMES and driver in POSTGRES_DRIVERS:
            return _postgres(parts)
        raise ValueError(f"it begins with {parts['scheme']}://, which is not supported; {EXAMPLES}")

    @property
    def location(self) -> str:
        """The location for display, without the password."""
        if self.backend == "sqlite":
            return self.database
        hosts = ",".join(f"{host}:{port}" if port else host for host, port in self.hosts)
        return f"postgresql://{hosts}/{self.database}"


def sqlite_url(file: Path) -> str:
    """The URL of a SQLite file; its path may contain any character."""
    return f"sqlite:///{quote(os.fsencode(file))}"


def _sqlite(parts: re.Match[str]) -> DatabaseAddress:
    path = _decoded(parts["database"] or "")
    if parts["user"] is not None or parts["hosts"]:
        raise ValueError(
            "it has a host; a SQLite file has three slashes before its path, or four if the path is absolute"
        )
    if parts["query"]:
        name = parts["query"].partition("=")[0]
        raise ValueError(f"the option {name!r} is not supported; a SQLite URL has none (write a '?' in a path as %3F)")
    if not path or path == ":memory:" or path.startswith("file:"):
        raise ValueError("it names no file; use sqlite:////absolute/path/zeta.db")
    if "\0" in path:
        raise ValueError("its path contains a NUL character")
    return DatabaseAddress("sqlite", path)


def _postgres(parts: re.Match[str]) -> DatabaseAddress:
    texts = (parts["user"], parts["password"], parts["database"])
    user, password, database = (None if text is None else _decoded(text) for text in texts)
    hosts = tuple(_host(text) for text in parts["hosts"].split(",")) if parts["hosts"] else ()
    return DatabaseAddress("postgresql", database or "", hosts, user, password, _options(parts["query"] or ""))


def _host(text: str) -> tuple[str, int | None]:
    parts = _HOST.fullmatch(text)
    if parts is None:
        raise ValueError("one of its hosts is not HOST, HOST:PORT or [IPv6]:PORT")
    port = parts["port"]
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("its port is not a number from 1 to 65535")  # it may be a password without its '@'
    return _decoded(parts["host"].strip("[]")), int(port) if port else None


def _options(query: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):  # libpq reads '+' as it is
        if name in given:
            raise ValueError(f"the option {name!r} is given twice")
        if "\0" in value:
            raise ValueError(f"the option {name!r} contains a NUL character")
        given[name] = value
    options: dict[str, str] = {}
    for name, value in given.items():
        for translated, text in _translated(name, value):
            if options.setdefault(translated, text) != text:
                raise ValueError(f"the options 'ssl' and {translated!r} contradict each other; keep one of them")
    return options


def _translated(name: str, value: str) -> list[tuple[str, str]]:
    """The libpq options for an option of the URL; empty if the option has no effect here."""
    if name == "sslmode" and value not in SSL_MODES:
        raise ValueError(f"the option 'sslmode' is {value!r}; use {', '.join(SSL_MODES)}")
    if name in NUMBERS and not (value.isascii() and value.isdigit()):
        raise ValueError(f"the option {name!r} is {value!r}; use a whole number")
    if name in LIBPQ_OPTIONS:
        return [(name, value)]
    if name == "ssl":
        if value.lower() not in SSL_MODE_OF:
            raise ValueError(f"the option 'ssl' is {value!r}; use sslmode= with {', '.join(SSL_MODES)}")
        return [("sslmode", SSL_MODE_OF[value.lower()])]
    if name in _HARMLESS:
        if not re.fullmatch(_HARMLESS[name], value):
            raise ValueError(f"the option {name!r} is {value!r}, which is not supported; remove it")
        return []
    close = difflib.get_close_matches(name, LIBPQ_OPTIONS, n=1, cutoff=0.8)
    fix = f"did you mean {close[0]!r}?" if close else "libpq has no such option; remove it"
    raise ValueError(f"the option {name!r} is not supported: {fix}")


# Options of other client libraries, with the values that have no effect here.
_HARMLESS = {
    "pgbouncer": r"true|false|1|0",  # Prisma; prepared statements are never used
    "statement_cache_size": "0",  # asyncpg, likewise
    "prepared_statement_cache_size": "0",  # SQLAlchemy's asyncpg dialect, likewise
    "schema": "public",  # Prisma: PostgreSQL's default
    "supa": r"[\w.-]*",  # Supabase and Vercel: the origin of the URL
    "workaround": r"[\w.-]*",  # Vercel, likewise
    "uselibpqcompat": r"true|false",  # node-postgres: `sslmode` as libpq reads it
}


def _decoded(text: str) -> str:
    """Percent-decoded; bytes that aren't UTF-8 become surrogate escapes, as in file names."""
    return os.fsdecode(unquote_to_bytes(os.fsencode(text)))
