"""The open connections of a server process: their maximum number, and which one is closed for a new one.

Each connection needs a file descriptor, which the database, uploads and downloads need as well. When the limit is
reached, the connection that has waited longest for a complete request head is closed, so connections that send nothing
cannot keep others out.
"""

from __future__ import annotations

import resource
from typing import Protocol

RESERVED_FILES = 256  # descriptors for the database, Redis, uploads and downloads
MAX_CONNECTIONS = 16_384  # about 1 GB if each of them has a full request head and a full write buffer


class Closable(Protocol):
    def close_idle(self) -> None:
        """Close the connection, which has no request in progress."""
        ...


class ConnectionLimit:
    """Counts the connections of one process. Used only in the event loop's thread."""

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._open: set[Closable] = set()
        self._idle: dict[Closable, None] = {}  # waiting for a complete request head; the longest wait is first

    def register(self, connection: Closable) -> bool:
        """Register a new connection. Returns false if the limit is reached and all others are busy."""
        if len(self._open) >= self.max_connections:
            longest = next(iter(self._idle), None)
            if longest is None:
                return False
            self.unregister(longest)
            longest.close_idle()
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def mark_busy(self, connection: Closable) -> None:
        """Record that the connection's request head is complete."""
        self._idle.pop(connection, None)

    def mark_idle(self, connection: Closable) -> None:
        """Record that the connection's last response is complete."""
        if connection in self._open:
            self._idle[connection] = None

    def unregister(self, connection: Closable) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)


def connection_limit() -> ConnectionLimit:
    """The limit that this process's file descriptors allow, after raising the soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        new_soft = MAX_CONNECTIONS + RESERVED_FILES if hard == resource.RLIM_INFINITY else hard
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (new_soft, hard))
            soft = new_soft
        except (ValueError, OSError):
            pass  # macOS reports a hard limit that it does not accept
    files = MAX_CONNECTIONS + RESERVED_FILES if soft == resource.RLIM_INFINITY else soft
    return ConnectionLimit(max(1, min(MAX_CONNECTIONS, files - RESERVED_FILES)))
