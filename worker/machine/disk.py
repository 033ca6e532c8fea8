"""Monitors the free disk space of the worker's folder and of the artifact store.

A small file is kept as a reserve. When the disk is completely full, it is removed, so that the runs can still write
their last lines, which report the full disk.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from worker.machine.background_check import BackgroundCheck
from worker.threads import Outage

CHECK_SECONDS = 2.0
RESERVE_BYTES = 2**20
RECOVERY_FACTOR = 1.25  # low until this many times the mark is free, so that jobs are not paused and resumed repeatedly

logger = logging.getLogger(__name__)


class DiskSpace:
    """``is_low``: less than ``min_free_bytes`` is free on one of ``folders``; ``free_bytes`` is the least of them."""

    def __init__(self, folders: Sequence[Path], reserve: Path, *, min_free_bytes: int, executor: Executor) -> None:
        """``reserve`` is the file that reserves disk space."""
        self._folders = folders
        self._reserve = reserve
        self._min_free_bytes = min_free_bytes
        self.outage = Outage("The free disk space cannot be determined", name="disk")
        self._check = BackgroundCheck[int | None](executor, self.outage)
        self._next_check = 0.0
        self.free_bytes: int | None = None
        self.is_low = False

    def step(self) -> None:
        """Apply the result of the last check and start the next one; never waits for a hanging disk."""
        now = time.monotonic()
        self._check.finish(self._update)
        if now >= self._next_check and self._check.start(self._measure):
            self._next_check = now + CHECK_SECONDS

    def release_reserve(self) -> None:
        """Free the reserve on a full disk, so that a few lines can be written."""
        self._reserve.unlink(missing_ok=True)

    def _measure(self) -> int | None:
        free = _least_free(self._folders)
        if free is not None and free > max(RESERVE_BYTES, self._min_free_bytes) and not self._reserve.exists():
            try:
                self._reserve.write_bytes(bytes(RESERVE_BYTES))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                return 0  # bytes are free, but no inode is, or this user's quota is used up
        return free

    def _update(self, free_bytes: int | None) -> None:
        self.free_bytes = free_bytes
        if free_bytes is None:
            return
        was_low, mark = self.is_low, self._min_free_bytes
        self.is_low = free_bytes < (mark * RECOVERY_FACTOR if was_low else mark)
        if self.is_low and not was_low:
            logger.warning(
                "Only %d MB are free, less than ZETA_DISK_MIN_FREE_BYTES: runs save and pause.",
                free_bytes // 10**6,
                extra={"action": "disk_low"},
            )
        elif was_low and not self.is_low:
            logger.info(
                "The disk has enough free space again: %d MB.", free_bytes // 10**6, extra={"action": "disk_has_space"}
            )


def _least_free(folders: Sequence[Path]) -> int | None:
    """The least free space of the folders' file systems; a missing folder counts as its nearest existing parent."""
    free: list[int] = []
    for folder in folders:
        existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
        if existing is not None:
            free.append(shutil.disk_usage(existing).free)
    return min(free, default=None)
