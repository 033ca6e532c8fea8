"""Redis access shared by server and workers: a strict parser for ZETA_REDIS_URL, and one error for outages.

redis-py ignores an invalid database number and fails at its first call for an unknown option, its ``unix://`` is
``redis+socket://`` in Celery, and it has no URL for Sentinel. So only `RedisAddress` reads the URL. It rejects unknown
parts, and writes the URL and the options for each client library.
"""

from __future__ import annotations

import difflib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from zeta_core.system.outage import error_text

SOCKET_TIMEOUT_SECONDS = 2.0
SENTINEL = "redis+sentinel"
SCHEMES = ("redis", "rediss", "unix", SENTINEL)
# Named as in redis-py (https://redis.readthedocs.io/en/stable/connections.html); Celery knows them too.
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
TLS_OPTIONS = (*TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname")
SENTINEL_OPTIONS = ("master", "sentinel_username", "sentinel_password")
OPTIONS = ("db", *TLS_OPTIONS, *SENTINEL_OPTIONS)
SENTINEL_PORT = 26379
SENTINEL_SECONDS = 0.5  # for each question to a sentinel; the next one is asked after that
# Celery's documentation uses the names of Python's ssl module.
CERTIFICATE_REQUIREMENTS = {
    **{name: name for name in ("required", "optional", "none")},
    **{f"cert_{name}": name for name in ("required", "optional", "none")},
}
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class RedisUnavailable(Exception):
    """Redis is unreachable, rejects commands (loading, read-only, out of memory, access), or violates its protocol."""


@contextmanager
def calling_redis() -> Generator[None]:
    """Raise `RedisUnavailable` for any exception in a block that only calls Redis.

    A list of exceptions would be incomplete: for replies that aren't valid RESP, redis-py's parsers raise arbitrary
    exceptions.
    """
    try:
        yield
    except RedisUnavailable:
        raise
    except Exception as error:
        raise RedisUnavailable(error_text(error)) from error


def open_client(url: str, library: Any, retry: Any) -> Any:
    """A client of ``library``, which is the module `redis` or `redis.asyncio`. Its calls take at most two seconds.

    ``retry`` is the library's object that decides how often a call is repeated.

    With Sentinel, a call may also take the time to find the master. After a failover, a call on a connection to the
    former master fails, and the next one finds the new master.
    """
    address = RedisAddress.parse(url)
    seconds = SOCKET_TIMEOUT_SECONDS
    options: dict[str, Any] = {"socket_timeout": seconds, "socket_connect_timeout": seconds, "retry": retry}
    if address.sentinel is None:
        return library.Redis.from_url(address.client_url, **options)
    sentinel_options = {**address.sentinel.options, "retry": retry}
    sentinel = library.sentinel.Sentinel(address.sentinel.hosts, sentinel_kwargs=sentinel_options)
    return sentinel.master_for(address.sentinel.master, **address.client_options, **options)


@dataclass(frozen=True)
class SentinelAddress:
    """The Sentinel processes that know which Redis server is the master, and their own credentials."""

    hosts: tuple[tuple[str, int], ...]
    master: str  # the name of the monitored master
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """The options of redis-py for a connection to a sentinel."""
        seconds = {"socket_timeout": SENTINEL_SECONDS, "socket_connect_timeout": SENTINEL_SECONDS}
        return {**seconds, "username": self.username, "password": self.password}


@dataclass(frozen=True)
class RedisAddress:
    """The location of Redis, its database number and the credentials.

    With ``sentinel``, the clients ask for the location whenever they connect, and ``host`` is empty.
    """

    scheme: str
    host: str = ""
    port: int = 6379
    socket: str = ""  # the path of a UNIX socket
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Mapping[str, str] = field(default_factory=dict[str, str])
    sentinel: SentinelAddress | None = None

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Raises `ValueError` with a sentence that never contains the URL, which may contain a password."""
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in SCHEMES:
            raise ValueError("it must begin with redis://, rediss://, unix:// or redis+sentinel://")
        parts = urlsplit(url)
        if parts.fragment or url.endswith("#"):
            raise ValueError("it contains '#'; write it as %23")
        options = _options(parts)
        if scheme != "rediss" and (tls := [name for name in options if name in TLS_OPTIONS]):
            raise ValueError(f"the option {tls[0]!r} is for TLS; begin the URL with rediss://")
        if scheme != SENTINEL and (given := [name for name in options if name in SENTINEL_OPTIONS]):
            raise ValueError(f"the option {given[0]!r} is for Sentinel; begin the URL with {SENTINEL}://")
        host, port = ("", 0) if scheme in ("unix", SENTINEL) else _server(parts)
        return cls(
            scheme,
            host=host,
            port=port,
            socket=_socket(parts) if scheme == "unix" else "",
            database=_database(parts, options),
            username=_decoded(parts.username),
            password=_decoded(parts.password),
            tls={name: _tls_value(name, value) for name, value in options.items() if name in TLS_OPTIONS},
            sentinel=_sentinel(parts, options) if scheme == SENTINEL else None,
        )

    @property
    def location(self) -> str:
        """The address for display, without the password."""
        if self.sentinel is not None:
            return f"{self.sentinel.master} ({', '.join(f'{host}:{port}' for host, port in self.sentinel.hosts)})"
        return self.socket or f"{self._host}:{self.port}"

    @property
    def client_url(self) -> str:
        """The URL for redis-py. There is none with ``sentinel``, which is used with `client_options` instead."""
        assert self.sentinel is None, "redis-py has no URL for Sentinel"
        if self.socket:
            return f"unix://{self._login}{quote(self.socket)}?db={self.database}"
        return self._network_url

    @property
    def celery_url(self) -> str:
        """The URL for Celery's broker (kombu), to be used with `celery_options`."""
        if self.sentinel is not None:  # kombu may continue with any of them, so each has the credentials
            urls = (f"sentinel://{self._login}{host}:{port}/{self.database}" for host, port in self.sentinel.hosts)
            return ";".join(urls)
        if self.socket:
            return f"redis+socket://{self._login}{quote(self.socket)}?virtual_host={self.database}"
        return self._network_url

    @property
    def client_options(self) -> dict[str, Any]:
        """The options of redis-py for a connection to the master that the sentinels name."""
        return {"db": self.database, "username": self.username, "password": self.password}

    @property
    def celery_options(self) -> dict[str, Any]:
        """Further ``broker_transport_options`` of Celery."""
        if self.sentinel is None:
            return {}
        return {"master_name": self.sentinel.master, "sentinel_kwargs": self.sentinel.options}

    @property
    def _network_url(self) -> str:
        # Explicit, because Celery accepts any certificate by default.
        options = f"?{urlencode({'ssl_cert_reqs': 'required', **self.tls})}" if self.scheme == "rediss" else ""
        return f"{self.scheme}://{self._login}{self._host}:{self.port}/{self.database}{options}"

    @property
    def _host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def _login(self) -> str:
        if self.username is None and self.password is None:
            return ""
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return f"{quote(self.username or '', safe='')}{password}@"


def _options(parts: SplitResult) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(OPTIONS)}"
            raise ValueError(f"the option {name!r} is not supported; {fix}")
        if name in options:
            raise ValueError(f"the option {name!r} is given twice")
        options[name] = value
    return options


def _server(parts: SplitResult) -> tuple[str, int]:
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(
            "its port is not a number from 1 to 65535; if the password contains '/', '?' or '#', percent-encode them"
        ) from error
    if port == 0:
        raise ValueError("its port is 0")
    if "," in parts.netloc.rpartition("@")[2]:
        raise ValueError("it names several hosts; use one of them, or the address of a proxy")
    return unquote(parts.hostname or "localhost"), 6379 if port is None else port


def _sentinel(parts: SplitResult, options: Mapping[str, str]) -> SentinelAddress:
    if not options.get("master"):
        raise ValueError("it lacks the name of the master that the sentinels monitor; add ?master=NAME")
    hosts = tuple(_sentinel_host(text) for text in parts.netloc.rpartition("@")[2].split(","))
    return SentinelAddress(
        hosts, options["master"], options.get("sentinel_username") or None, options.get("sentinel_password") or None
    )


def _sentinel_host(text: str) -> tuple[str, int]:
    """The host and the port in one part of a list such as ``a:26379,b``."""
    part = urlsplit(f"//{text}")
    try:
        port = part.port
    except ValueError:
        port = 0
    if not part.hostname or port == 0 or ":" in part.hostname:
        raise ValueError("it needs the sentinels as HOST:PORT, separated by commas, such as a:26379,b:26379,c:26379")
    return unquote(part.hostname), SENTINEL_PORT if port is None else port


def _socket(parts: SplitResult) -> str:
    if parts.netloc.rpartition("@")[2]:
        raise ValueError("the path of its socket must be absolute: unix:///path/to/redis.sock")
    path = unquote(parts.path)
    if not path.startswith("/") or path.endswith("/"):
        raise ValueError("it names no socket; write unix:///path/to/redis.sock")
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"the path of its socket is longer than {MAX_SOCKET_PATH_BYTES} bytes, the system's limit")
    return path


MAX_SOCKET_PATH_BYTES = 107  # sun_path in unix(7) has 108, including the terminating NUL


def _database(parts: SplitResult, options: Mapping[str, str]) -> int:
    in_path = "" if parts.scheme == "unix" else unquote(parts.path).removeprefix("/").removesuffix("/")
    given = {text for text in (in_path, options.get("db")) if text}
    if "db" in options and not options["db"]:
        raise ValueError("its option 'db' is empty; use the number of a database, such as 0")
    if len(given) > 1:
        raise ValueError(f"it names two databases, {in_path!r} and db={options['db']!r}; keep one of them")
    text = given.pop() if given else "0"
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"its database is {text!r}; use a number, such as 0")
    return int(text)


def _tls_value(name: str, value: str) -> str:
    known = value.lower()
    if name == "ssl_cert_reqs":
        if known not in CERTIFICATE_REQUIREMENTS:
            raise ValueError(f"its option ssl_cert_reqs is {value!r}; use required, optional or none")
        return CERTIFICATE_REQUIREMENTS[known]
    if name == "ssl_check_hostname":
        if known not in BOOLEANS:
            raise ValueError(f"its option ssl_check_hostname is {value!r}; use true or false")
        return "true" if BOOLEANS[known] else "false"
    if not Path(value).is_file():
        raise ValueError(f"its option {name} is {value!r}, which is not a file")
    return value


def _decoded(text: str | None) -> str | None:
    return unquote(text) if text else None
