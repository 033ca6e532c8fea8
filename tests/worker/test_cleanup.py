"""Cleanup removes old run directories, those of deleted jobs, and unused cache entries."""

import os
import time
from pathlib import Path

from worker.artifacts.cleanup import sweep, sweep_deleted
from zeta_core.contract.wire.run_directory import PUBLISHED_FILE
from zeta_core.system.artifact_store.folder import FolderStore

HOUR, DAY = 3600, 86_400


def make(path: Path, *, age_seconds: float, size: int = 10) -> Path:
    """Create a directory of the given age with one file of ``size`` bytes."""
    path.mkdir(parents=True)
    (path / "file").write_bytes(bytes(size))
    touched = time.time() - age_seconds
    os.utime(path, (touched, touched))
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_run_directories_are_kept_for_a_day_and_while_their_job_runs(tmp_path: Path) -> None:
    for job in ("job_ended", "job_running"):
        make(tmp_path / f"runs/{job}/attempt-1", age_seconds=25 * HOUR)
        make(tmp_path / f"runs/{job}/attempt-2", age_seconds=23 * HOUR)
    make(tmp_path / "runs/job_old/attempt-1", age_seconds=3 * DAY)
    os.utime(tmp_path / "runs/job_old", (0, 0))
    sweep(tmp_path, {"job_running"}, cache_max_bytes=10**6, need_space=False)
    assert names(tmp_path / "runs/job_ended") == ["attempt-2"]
    assert names(tmp_path / "runs/job_running") == ["attempt-1", "attempt-2"]
    assert names(tmp_path / "runs/job_old") == []  # the empty folder is removed a day later


def test_published_attempts_of_deleted_jobs_are_removed_if_the_store_is_mounted(tmp_path: Path) -> None:
    root, store = tmp_path / "home", FolderStore(tmp_path / "artifacts")
    for job in ("job_deleted", "job_kept", "job_running", "job_unpublished"):
        make(root / f"runs/{job}/attempt-1", age_seconds=0)
        (root / f"runs/{job}/attempt-1" / PUBLISHED_FILE).touch()
    make(root / "runs/job_unpublished/attempt-2", age_seconds=0)
    sweep_deleted(root, {"job_running"}, store)  # the store is not mounted
    assert len(names(root / "runs")) == 4
    store.open_job("job_kept")  # an attempt without a journal
    sweep_deleted(root, {"job_running"}, store)
    assert names(root / "runs") == ["job_kept", "job_running", "job_unpublished"]
    assert names(root / "runs/job_unpublished") == ["attempt-2"]


def test_the_least_recently_used_cache_entries_are_removed_but_none_in_use(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for age in (0, 2 * HOUR, 3 * DAY, 6 * DAY, 8 * DAY):
        make(cache / f"{age:06}", age_seconds=age, size=1000)
    (cache / "file").write_bytes(bytes(10))

    sweep(tmp_path, (), cache_max_bytes=10**6, need_space=False)
    assert names(cache) == ["000000", "007200", "259200", "518400", "file"], "entries not used for a week are removed"
    sweep(tmp_path, (), cache_max_bytes=2500, need_space=False)
    assert names(cache) == ["000000", "007200", "file"], "the oldest entry beyond the limit is removed"
    sweep(tmp_path, (), cache_max_bytes=2500, need_space=True)
    assert names(cache) == ["000000", "file"], "more entries are removed if space is needed"
    sweep(tmp_path, (), cache_max_bytes=0, need_space=True)
    assert names(cache) == ["000000", "file"]
