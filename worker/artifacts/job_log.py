"""Copies a run's log to the artifact store while it grows, and limits the size of both files.

The stored log contains the beginning, up to the limit, and the last `TAIL_BYTES`, which are added when the attempt is
over; a line between them marks the gap. Beyond the limit, the file in the run directory is repeatedly truncated to its
end, so that a verbose run can't fill the disk; only output written during a truncation is lost. The sizes of the
files determine where to continue, so a restarted worker continues like the one before it.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from zeta_core.system.artifact_store import ArtifactStore
from zeta_core.system.durable_files import write_atomically

COPY_BYTES = 4 * 2**20
TAIL_BYTES = 256 * 1024
EARLIER_SUFFIX = ".1"  # beside the log: its end before the last truncation
CUT_LINE = b"\n--- The log reached its limit (ZETA_LOG_MAX_BYTES): what follows is only its end. ---\n"


class JobLog:
    """``log`` is the file that the run writes; it is stored under ``key``, beside those of the job's other attempts.

    The folder of the logs is created, but never the job's folder: the log of a deleted job stays deleted.
    """

    def __init__(self, log: Path, store: ArtifactStore, key: PurePosixPath, *, max_bytes: int) -> None:
        self._log = log
        self._earlier = log.with_name(log.name + EARLIER_SUFFIX)
        self._store = store
        self._key = key
        self._stored = store.root / key
        self._max_bytes = max_bytes
        self._limit: int | None = None
        self._published_bytes: int | None = None  # the size of the copy that the store has

    def copy(self) -> None:
        """Store the new part of the log, and truncate the log beyond the limit. Raises `OSError`."""
        self._append()
        self._publish()

    def _append(self) -> None:
        size = _size(self._log)
        if size == 0:
            return
        limit = self._bytes_of_this_attempt()
        self._stored.parent.mkdir(exist_ok=True)
        with self._stored.open("ab") as stored:
            position = stored.seek(0, os.SEEK_END)
            if position < min(size, limit):
                with self._log.open("rb") as log:
                    log.seek(position)
                    _copy(log, stored, min(size, limit) - position)
                position = min(size, limit)
            if position == limit < size:
                stored.write(CUT_LINE)
                position += len(CUT_LINE)
        if position > limit and size > 4 * TAIL_BYTES:
            self._cut(size, limit)

    def complete(self) -> None:
        """Store the rest; the attempt is over. Repeating it changes nothing. Raises `OSError`."""
        self._append()
        begin_of_tail = self._bytes_of_this_attempt() + len(CUT_LINE)
        if _size(self._stored) >= begin_of_tail:
            with self._stored.open("rb+") as stored:
                stored.truncate(begin_of_tail)
                stored.seek(begin_of_tail)
                stored.write(self._tail())
            self._published_bytes = None
        self._publish()

    def _publish(self) -> None:
        size = _size(self._stored)
        if size and size != self._published_bytes:
            self._store.publish(self._key)
            self._published_bytes = size

    def _cut(self, size: int, limit: int) -> None:
        """Copy the log's end to a file beside it and truncate the log, to which its writers append."""
        tail = self._tail(size, limit)
        write_atomically(self._earlier, tail)
        os.truncate(self._log, 0)

    def _tail(self, size: int | None = None, limit: int | None = None) -> bytes:
        """The end of the log, without the beginning that is already stored."""
        size = _size(self._log) if size is None else size
        limit = self._bytes_of_this_attempt() if limit is None else limit
        was_cut = self._earlier.exists()
        begin = max(0 if was_cut else min(limit, size), size - TAIL_BYTES)
        with self._log.open("rb") as log:
            log.seek(begin)
            tail = log.read(size - begin)
        return ((self._earlier.read_bytes() if was_cut else b"") + tail)[-TAIL_BYTES:]

    def _bytes_of_this_attempt(self) -> int:
        """The rest of the job's limit after its earlier attempts, and at least enough for the end of the log."""
        if self._limit is None:
            stored = self._store.objects(self._key.parent)
            others = [found.num_bytes for found in stored if found.key != self._key]
            self._limit = max(TAIL_BYTES, self._max_bytes - sum(others))
        return self._limit


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _copy(source: BinaryIO, target: BinaryIO, number: int) -> None:
    while number > 0 and (data := source.read(min(COPY_BYTES, number))):
        target.write(data)
        number -= len(data)
