"""Removes old run directories, those of deleted jobs, and unused cache entries from a worker's folder."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Collection
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path

from zeta_core.contract.wire.run_directory import CACHE_DIRECTORY, PROJECT_CACHES, PUBLISHED_FILE
from zeta_core.system.artifact_store import ArtifactStore

INTERVAL_SECONDS, LOW_DISK_INTERVAL_SECONDS, DELETED_INTERVAL_SECONDS = 3600.0, 60.0, 30.0
RUN_RETENTION_SECONDS = 86_400.0  # run directories, which are small text files by then, for people to read
CACHE_RETENTION_SECONDS = 7 * 86_400.0  # a run touches the entries that it uses, and keeps their files open
CACHE_IN_USE_SECONDS = 3600.0  # a run may have found a younger entry without having opened it yet

logger = logging.getLogger(__name__)


class Cleanup:
    """Runs `sweep` and `sweep_deleted` at intervals in the executor, more often when disk space is low."""

    def __init__(self, root: Path, store: ArtifactStore, executor: Executor, *, cache_max_bytes: int) -> None:
        """``root`` is the worker's own folder."""
        self._root = root
        self._store = store
        self._executor = executor
        self._cache_max_bytes = cache_max_bytes
        self._swept_at = self._checked_deleted_at = float("-inf")
        self._work: Future[None] | None = None

    def step(self, active_jobs: Collection[str], *, disk_is_low: bool) -> None:
        """Start the next cleanup if it is due; never blocks."""
        if self._work is not None and self._work.done():
            work, self._work = self._work, None
            if error := work.exception():
                logger.warning("Old files could not be removed: %s", error, extra={"action": "sweep"})
        if self._work is not None:
            return
        now = time.monotonic()
        if now - self._swept_at >= (LOW_DISK_INTERVAL_SECONDS if disk_is_low else INTERVAL_SECONDS):
            self._swept_at = now
            self._work = self._executor.submit(self._sweep, frozenset(active_jobs), disk_is_low)
        elif now - self._checked_deleted_at >= DELETED_INTERVAL_SECONDS:
            self._checked_deleted_at = now
            self._work = self._executor.submit(sweep_deleted, self._root, active_jobs, self._store)

    def _sweep(self, active_jobs: frozenset[str], need_space: bool) -> None:
        sweep(self._root, active_jobs, cache_max_bytes=self._cache_max_bytes, need_space=need_space)
        max_age_seconds = CACHE_IN_USE_SECONDS if need_space else RUN_RETENTION_SECONDS
        self._store.remove_unused_copies(active_jobs, max_age_seconds)


def sweep(root: Path, active_jobs: Collection[str], *, cache_max_bytes: int, need_space: bool) -> None:
    """Remove old run directories of jobs that are not in ``active_jobs``, and unneeded cache entries.

    These are entries that were not used for a week; beyond ``cache_max_bytes``, the least recently used ones; and, if
    ``need_space``, all that are not in use.
    """
    for job in root.glob("runs/*"):
        if job.name in active_jobs:
            continue
        for directory in job.iterdir():
            if _age_seconds(directory) > RUN_RETENTION_SECONDS:
                shutil.rmtree(directory)
        if not any(job.iterdir()) and _age_seconds(job) > RUN_RETENTION_SECONDS:
            job.rmdir()
    found = (*root.glob(f"{PROJECT_CACHES}/*/*"), *root.glob(f"{CACHE_DIRECTORY}/*"))
    entries = sorted(found, key=_age_seconds)  # the newest first
    size = 0
    for entry in entries:
        age = _age_seconds(entry)
        size += _size_bytes(entry)
        too_much = need_space or size > cache_max_bytes
        if age > CACHE_RETENTION_SECONDS or (too_much and age > CACHE_IN_USE_SECONDS):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def sweep_deleted(root: Path, active_jobs: Collection[str], store: ArtifactStore) -> None:
    """Remove the run directories of deleted jobs, which no longer have a folder in ``store``.

    Only those of published attempts: these have no processes and no unpublished lines left.
    """
    for job in root.glob("runs/*"):
        if job.name in active_jobs or not store.is_deleted(job.name):
            continue
        for directory in job.glob("attempt-*"):
            if (directory / PUBLISHED_FILE).exists():
                shutil.rmtree(directory)
        with suppress(OSError):  # it contains something else
            job.rmdir()


def _age_seconds(path: Path) -> float:
    """The time since the file was last touched, by the wall clock."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # removed in the meantime


def _size_bytes(path: Path) -> int:
    size = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(FileNotFoundError):  # removed in the meantime
            size += file.lstat().st_size  # a copy of a model links to weights elsewhere
    return size
