"""Removes what a worker's home holds no longer than it must: old run directories, and what of the cache is not used."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from worker.artifacts.store import ArtifactStore
from zeta_core.contract.wire.run_directory import CACHE_DIRECTORY, PUBLISHED_FILE

RUNS_KEPT_SECONDS = 86_400.0  # run directories (small text files by then) are kept a day, for people
CACHE_KEPT_SECONDS = 7 * 86_400.0  # a training touches what it uses; one that runs longer has its files open
CACHE_IN_USE_SECONDS = 3600.0  # younger than this, it may be that a training has found it and not opened it yet


def sweep(root: Path, active_jobs: Collection[str], *, cache_max_bytes: int, need_room: bool) -> None:
    """Remove what is old of jobs that are not in ``active_jobs``, and of the cache what need not be kept.

    Of the cache goes what a week did not use, what was used longest ago beyond ``cache_max_bytes``, and, where room is
    needed, all that is not in use.
    """
    for job in root.glob("runs/*"):
        if job.name in active_jobs:
            continue
        for directory in job.iterdir():
            if _age_seconds(directory) > RUNS_KEPT_SECONDS:
                shutil.rmtree(directory)
        if not any(job.iterdir()) and _age_seconds(job) > RUNS_KEPT_SECONDS:
            job.rmdir()
    entries = sorted(root.glob(f"{CACHE_DIRECTORY}/*"), key=_age_seconds)  # the newest first
    size = 0
    for entry in entries:
        age = _age_seconds(entry)
        size += _size_bytes(entry)
        too_much = need_room or size > cache_max_bytes
        if age > CACHE_KEPT_SECONDS or (too_much and age > CACHE_IN_USE_SECONDS):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def sweep_deleted(root: Path, active_jobs: Collection[str], store: ArtifactStore) -> None:
    """Remove the run directories of jobs that were deleted: nothing of theirs is left in ``store``.

    Only of attempts that are published: nothing of those is alive, and nothing that they said is still to be told.
    """
    for job in root.glob("runs/*"):
        if job.name in active_jobs or not store.is_deleted(job.name):
            continue
        for directory in job.glob("attempt-*"):
            if (directory / PUBLISHED_FILE).exists():
                shutil.rmtree(directory)
        with suppress(OSError):  # something else is in it, or came into it meanwhile
            job.rmdir()


def _age_seconds(path: Path) -> float:
    """Since the file was last touched, by the wall clock that also touched it."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # removed meanwhile


def _size_bytes(path: Path) -> int:
    size = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(FileNotFoundError):  # removed meanwhile
            size += file.lstat().st_size  # a copy of a model holds links to weights that lie elsewhere
    return size
