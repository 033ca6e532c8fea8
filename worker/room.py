"""How much room is left where this worker works and where it stores checkpoints, asked of the system now and then."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from pathlib import Path

LOOK_SECONDS = 2.0
ENOUGH_AGAIN = 1.25  # low until this many times the mark is free: a job is not paused and resumed again and again

logger = logging.getLogger(__name__)


class Room:
    """``is_low``: less than ``min_free_bytes`` is free on one of ``folders``; ``free_bytes`` is the least of them."""

    def __init__(self, folders: Sequence[Path], *, min_free_bytes: int, executor: Executor) -> None:
        self._folders = folders
        self._min_free_bytes = min_free_bytes
        self._executor = executor
        self._look: Future[int | None] | None = None
        self._next_look = 0.0
        self.free_bytes: int | None = None
        self.is_low = False

    def step(self) -> None:
        """Take in what the last look found and begin the next one; a disk that hangs holds up nobody."""
        now = time.monotonic()
        if self._look is not None and self._look.done():
            self._judge(self._look.result())
            self._look = None
        if self._look is None and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._look = self._executor.submit(_least_free, self._folders)

    def _judge(self, free_bytes: int | None) -> None:
        self.free_bytes = free_bytes
        if free_bytes is None:
            return
        was_low, mark = self.is_low, self._min_free_bytes
        self.is_low = free_bytes < (mark * ENOUGH_AGAIN if was_low else mark)
        if self.is_low and not was_low:
            logger.warning(
                "Only %d MB are free, less than ZETA_DISK_MIN_FREE_BYTES: trainings save and pause.",
                free_bytes // 10**6,
                extra={"action": "disk_low"},
            )
        elif was_low and not self.is_low:
            logger.info("The disk has room again: %d MB.", free_bytes // 10**6, extra={"action": "disk_has_room"})


def _least_free(folders: Sequence[Path]) -> int | None:
    """The least that is free on the file systems of the folders, or of the nearest of their parents that exist."""
    free: list[int] = []
    for folder in folders:
        there = next((place for place in (folder, *folder.parents) if place.exists()), None)
        if there is not None:
            free.append(shutil.disk_usage(there).free)
    return min(free, default=None)
