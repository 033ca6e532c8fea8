"""Limits the open streams of each key and project in one server process: event streams and followed logs.

A stream holds a connection and queries the database as long as its job runs, so without a limit one user could slow
down the server for all others. A client that is refused can read the stored events instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from zeta_core.contract.errors import QuotaExceeded

RETRY_SECONDS = 5


class StreamLimits:
    """Counts the open streams. Used only in the event loop's thread."""

    def __init__(self, max_per_key: int) -> None:
        self._max_per_key = max_per_key
        self._by_key: Counter[str] = Counter()
        self._by_project: Counter[str] = Counter()

    @contextmanager
    def open(self, key_id: str, project: str, max_per_project: int | None) -> Generator[None]:
        """Count one more stream until the block ends; ``max_per_project`` is ``None`` for no limit.

        Raises `QuotaExceeded` if the key or the project is at its limit.
        """
        if self._by_key[key_id] >= self._max_per_key:
            raise _too_many(f"This API key has {self._by_key[key_id]}", "ZETA_KEY_MAX_STREAMS")
        if max_per_project is not None and self._by_project[project] >= max_per_project:
            raise _too_many(f"Project {project!r} has {self._by_project[project]}", "max_streams")
        self._by_key[key_id] += 1
        self._by_project[project] += 1
        try:
            yield
        finally:
            _decrease(self._by_key, key_id)
            _decrease(self._by_project, project)


def _decrease(counts: Counter[str], name: str) -> None:
    counts[name] -= 1
    if not counts[name]:
        del counts[name]


def _too_many(subject: str, limit: str) -> QuotaExceeded:
    return QuotaExceeded(
        f"{subject} open streams, the limit of this server ({limit}); close one of them, or read the stored events "
        "(without `Accept: text/event-stream`) or the log (without `follow`).",
        code="too_many_streams",
        retry_after_seconds=RETRY_SECONDS,
    )
